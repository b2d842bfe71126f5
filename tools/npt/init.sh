# The machine's /init. The line above names busybox; the host says npt=0 or npt=1 on the kernel's
# command line. Standard output is the console; what the host must know goes to ttyS1, a line each.
export PATH=/npt/bin
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t proc proc /proc
mount -t sysfs sysfs /sys
exec 3>/dev/ttyS1
stty -F /dev/ttyS1 -opost -echo
stty -F /dev/console -opost -echo

finish() {
    echo 0 >/proc/sys/kernel/printk # no "Restarting system" after the last line
    stty -F /dev/console -opost     # waits until the console has everything
    echo "$*" >&3
    reboot -f                       # -no-reboot makes qemu end
}

for module in /npt/modules/*.ko; do
    case $module in
    *-kvm-amd.ko) insmod "$module" npt="$npt" ;;
    *) insmod "$module" ;;
    esac || finish "broken: $module could not be loaded"
done
[ -c /dev/kvm ] || finish "broken: kvm-amd.ko is loaded but there is no /dev/kvm"
nested=$(cat /sys/module/kvm_amd/parameters/npt)
case $npt$nested in
1Y | 1[1-9] | 0N | 00) ;;
*) finish "broken: asked for npt=$npt, kvm-amd.ko says npt=$nested" ;;
esac
chown root:kvm /dev/kvm
chmod 660 /dev/kvm
ifconfig lo up
echo "ready: $nested" >&3

setsid -c sh /npt/command </dev/null
status=$?
dmesg | grep -E 'WARNING:|BUG:|Oops|general protection|soft lockup|Out of memory' |
    while read -r line; do echo "kernel: $line" >&3; done
finish "exit: $status"
