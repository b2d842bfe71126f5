# The guests: freestanding ELF images, shipped beside the code that loads them (kvmmm/_guests).
#
# Included by CMakeLists.txt; `cmake -S guest -B build` by hand is not needed: guest/README.md has
# the one gcc command that does the same for a guest of your own.
include(CheckLinkerFlag)
enable_language(ASM)
check_linker_flag(C "LINKER:--no-warn-rwx-segments" KVMMM_LD_KNOWS_RWX_WARNING)

get_filename_component(guest_dir "${CMAKE_CURRENT_LIST_DIR}/../../guest" ABSOLUTE)

# No exceptions, no position independence, no vector registers, no runtime: ring 0 code that any KVM
# runs. The prefix map keeps the builder's paths out of the images. -fno-lto: start.S calls by name.
set(guest_compile_options
  -O2 -g -ffreestanding -fno-pic -fno-pie -mno-red-zone -mgeneral-regs-only -fno-stack-protector
  -fcf-protection=none -fno-asynchronous-unwind-tables -fno-lto -ffunction-sections -fdata-sections
  "-ffile-prefix-map=${guest_dir}=guest" "-ffile-prefix-map=${CMAKE_BINARY_DIR}=." -Wall -Wextra)
set(guest_link_options
  -nostdlib -static -no-pie -fno-lto -Wl,--build-id=none -Wl,-z,noexecstack
  -Wl,-z,max-page-size=4096 -Wl,-z,norelro -Wl,--gc-sections)

add_library(guest_library STATIC
  "${guest_dir}/lib/start.S" "${guest_dir}/lib/start.c" "${guest_dir}/lib/ring3.S"
  "${guest_dir}/lib/trap.S" "${guest_dir}/lib/trap.c" "${guest_dir}/lib/console.c"
  "${guest_dir}/lib/printf.c" "${guest_dir}/lib/report.c" "${guest_dir}/lib/args.c"
  "${guest_dir}/lib/memory.c" "${guest_dir}/lib/mem.c")
target_include_directories(guest_library PUBLIC "${guest_dir}/include" "${guest_dir}/lib")
target_compile_options(guest_library PUBLIC ${guest_compile_options})

# kvmmm_guest(NAME SCRIPT SOURCE...): sources and script relative to guest/; built as NAME.elf.
function(kvmmm_guest name script)
  list(TRANSFORM ARGN PREPEND "${guest_dir}/" OUTPUT_VARIABLE sources)
  set(target "guest_${name}")
  add_executable(${target} ${sources})
  target_link_libraries(${target} PRIVATE guest_library)
  target_link_options(${target} PRIVATE ${guest_link_options} -T "${guest_dir}/${script}")
  set_target_properties(${target} PROPERTIES
    OUTPUT_NAME "${name}" SUFFIX .elf LINKER_LANGUAGE C LINK_DEPENDS "${guest_dir}/${script}"
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/guests")
  install(TARGETS ${target} DESTINATION kvmmm/_guests)
endfunction()

foreach(name IN ITEMS args echo hello hog jump nox null qemu ro sieve spin touch traps trees triple)
  kvmmm_guest(${name} link.ld ${name}/main.c)
endforeach()

kvmmm_guest(straddle link-rwx.ld straddle/main.c straddle/scalar.c straddle/string.c
            straddle/vector.c straddle/avx.c straddle/control.c)
if(KVMMM_LD_KNOWS_RWX_WARNING)
  target_link_options(guest_straddle PRIVATE "LINKER:--no-warn-rwx-segments")
endif()

foreach(name IN ITEMS pio console touch)
  kvmmm_guest(bench_${name} link.ld bench/${name}/main.c)
endforeach()
kvmmm_guest(bench_first bench/first/first.ld bench/first/main.S)
target_link_options(guest_bench_first PRIVATE -s) # symbols would be most of the file

# Programs for ring 3: static Linux programs without a libc. What printf, report and options need of
# the guest library is built anew, as any program is: vector registers, a red zone, no fixed address.
add_library(guest_user_library STATIC
  "${guest_dir}/user/lib/start.S" "${guest_dir}/user/lib/start.c" "${guest_dir}/lib/printf.c"
  "${guest_dir}/lib/report.c" "${guest_dir}/lib/args.c" "${guest_dir}/lib/mem.c")
target_include_directories(guest_user_library PUBLIC
  "${guest_dir}/user/lib" "${guest_dir}/include" "${guest_dir}/lib")
target_compile_definitions(guest_user_library PUBLIC KVMMM_HOSTED)
target_compile_options(guest_user_library PUBLIC
  -O2 -g -ffreestanding -fPIE -fno-stack-protector -fcf-protection=none
  -fno-asynchronous-unwind-tables -fno-lto -ffunction-sections -fdata-sections
  "-ffile-prefix-map=${guest_dir}=guest" "-ffile-prefix-map=${CMAKE_BINARY_DIR}=." -Wall -Wextra)

# kvmmm_user_guest(NAME LINK_OPTION...): guest/user/NAME/main.c, built as user_NAME.elf.
function(kvmmm_user_guest name)
  set(target "guest_user_${name}")
  add_executable(${target} "${guest_dir}/user/${name}/main.c")
  target_link_libraries(${target} PRIVATE guest_user_library)
  target_link_options(${target} PRIVATE
    -nostdlib ${ARGN} -fno-lto -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,max-page-size=4096
    -Wl,-z,separate-code -Wl,--gc-sections)
  set_target_properties(${target} PROPERTIES
    OUTPUT_NAME "user_${name}" SUFFIX .elf LINKER_LANGUAGE C
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/guests")
  install(TARGETS ${target} DESTINATION kvmmm/_guests)
endfunction()

foreach(name IN ITEMS atomic fault fork hello mmap syscalls)
  kvmmm_user_guest(${name} -static -no-pie)
endforeach()
kvmmm_user_guest(stack -static-pie -Wl,--no-dynamic-linker)

install(FILES "${guest_dir}/manifest.toml" DESTINATION kvmmm/_guests)
