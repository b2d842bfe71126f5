"""IOOpts: how one copy is done; and what a subclass of CopyCore adopts."""

from __future__ import annotations

from typing import Any

import pytest

from kvmmm.safemem.ffi import CopyCore, GuardedLock, IOOpts, adopt

PAGE = 4096
MAX = 1 << 30


class TestIOOpts:
    def test_defaults(self):
        opts = IOOpts()
        assert (opts.ignore_permissions, opts.address_space_active, opts.mechanism) == (
            False, True, None,
        )  # fmt: skip
        assert repr(opts) == (
            "IOOpts(ignore_permissions=False, address_space_active=True, mechanism=None)"
        )

    @pytest.mark.parametrize("ignores", [False, True])
    @pytest.mark.parametrize("active", [False, True])
    @pytest.mark.parametrize("mechanism", [None, "internal", "walk", "mirror"])
    def test_repr_says_how_to_make_it(self, ignores: bool, active: bool, mechanism: str | None):
        opts = IOOpts(ignores, active, mechanism)
        again = eval(repr(opts))  # noqa: S307 - that is what is tested
        for one in (opts, again):
            assert one.ignore_permissions is ignores
            assert one.address_space_active is active
            assert one.mechanism == mechanism
        assert repr(again) == repr(opts)

    def test_immutable(self):
        opts = IOOpts()
        for name in ("ignore_permissions", "address_space_active", "mechanism", "flags"):
            with pytest.raises(AttributeError):
                setattr(opts, name, True)
        with pytest.raises(AttributeError):
            del opts.mechanism
        with pytest.raises(TypeError):
            IOOpts.mechanism = "walk"  # type: ignore[misc, assignment]
        with pytest.raises(TypeError):
            type("Mine", (IOOpts,), {})
        assert not hasattr(opts, "__dict__")

    @pytest.mark.parametrize("mechanism", ["", "Internal", "asio", "walk\0", 1, b"walk", ("walk",)])
    def test_a_mechanism_that_is_none(self, mechanism: Any):
        with pytest.raises(ValueError, match="'internal', 'walk', 'mirror' or None, not"):
            IOOpts(mechanism=mechanism)

    def test_arguments_that_are_none(self):
        with pytest.raises(TypeError):
            IOOpts(fast=True)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            IOOpts(False, True, None, 1)  # type: ignore[call-arg]

        class Unsure:
            def __bool__(self) -> bool:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            IOOpts(Unsure())  # type: ignore[arg-type]

    def test_as_a_keyword(self, core: CopyCore):
        assert core.copy_in(0, bytearray(), opts=None, ignore_permissions=False) == 0
        assert core.copy_in(0, bytearray(), opts=IOOpts(mechanism="walk")) == 0
        for wrong in (True, "walk", {"mechanism": "walk"}, IOOpts):
            with pytest.raises(TypeError, match="opts is an IOOpts or None"):
                core.copy_in(0, bytearray(), opts=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="unexpected keyword argument 'options'"):
            core.copy_in(0, bytearray(), options=None)  # type: ignore[call-arg]


class TestAdopt:
    def test_a_subclass_has_methods_of_its_own(self):
        @adopt
        class Mine(CopyCore):
            pass

        own = {name for name in vars(CopyCore) if not name.startswith("__")}
        own -= {"walk", "mirror", "max_addr"}  # what is no method
        assert own <= set(vars(Mine))
        assert "copy_in" in own
        assert type(Mine.copy_in) is type(CopyCore.copy_in)
        assert Mine.copy_in.__objclass__ is Mine  # type: ignore[attr-defined]
        mine = Mine(MAX, PAGE, 0)
        mine.forget(0, PAGE)
        assert mine.copy_out(0, b"") == 0
        with pytest.raises(TypeError):
            Mine.copy_in(CopyCore(MAX, PAGE, 0), 0, bytearray())

    def test_it_returns_the_class(self):
        class Mine(CopyCore):
            pass

        assert adopt(Mine) is Mine
        assert adopt(Mine) is Mine

    @pytest.mark.parametrize("wrong", [int, object, 5, None, "CopyCore", GuardedLock])
    def test_what_is_no_subclass(self, wrong: Any):
        with pytest.raises(TypeError, match="no subclass of CopyCore"):
            adopt(wrong)
        assert not hasattr(wrong, "copy_in")
