"""Numba's passes over a kernel's intermediate code, without work whose results nothing uses there.

Numba computes anew after nearly every pass which variables are alive where. Only generators, and functions that count
references, ask for it, the latter just before they are lowered and where an expression of whole arrays is rewritten.
The passes here differ from Numba's in nothing else.
"""

import functools
import types as python_types
from types import SimpleNamespace

from numba.core import ir, ir_utils, transforms, types
from numba.core.compiler_machinery import register_pass
from numba.core.postproc import PostProcessor, VariableLifetime
from numba.core.rewrites import rewrite_registry
from numba.core.typed_passes import IRLegalization, NopythonRewrites, ParforFusionPass, PreLowerStripPhis
from numba.core.untyped_passes import GenericRewrites, InlineClosureLikes, IRProcessing, ReconstructSSA
from numba.parfors.parfor import simplify_parfor_body_CFG
from numba.stencils.stencil import StencilFunc, stencil


class _Tidying(PostProcessor):
    """What Numba does after a pass; liveness only for those who ask."""

    def run(self, emit_dels: bool = False, extend_lifetimes: bool = False):
        code = self.func_ir
        if code.is_generator:
            super().run(emit_dels, extend_lifetimes)
            return
        code.blocks = transforms.canonicalize_cfg(code.blocks)
        code.variable_lifetime = VariableLifetime(code.blocks)
        code.generator_info = None
        if emit_dels:
            self._insert_var_dels(extend_lifetimes=extend_lifetimes)


def _lean(stock: type) -> type:
    """The pass, with our tidying in the place of Numba's: a copy of its function in which one name means another."""
    original = stock.run_pass
    names = original.__globals__ | {"postproc": SimpleNamespace(PostProcessor=_Tidying)}
    run_pass = python_types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    kind = type(f"Lean{stock.__name__}", (stock,), {"_name": f"tilewise_{stock._name}", "run_pass": run_pass})
    return register_pass(mutates_CFG=True, analysis_only=False)(kind)


def _assigned(code):
    """(variable's name, value) of every assignment."""
    for block in code.blocks.values():
        for statement in block.find_insts(ir.Assign):
            yield statement.target.name, statement.value


def _is_inlined(value) -> bool:
    """Whether InlineClosureLikes may turn it, or a call of it, into other code."""
    if isinstance(value, ir.Expr):
        return value.op in ("make_function", "build_list")
    if isinstance(value, ir.Global | ir.FreeVar):
        return value.value is functools.reduce or value.value is stencil or isinstance(value.value, StencilFunc)
    return False


@register_pass(mutates_CFG=True, analysis_only=False)
class _InlineClosureLikes(InlineClosureLikes):
    _name = "tilewise_inline_closure_likes"

    def run_pass(self, state):
        code = state.func_ir
        if code.is_generator or any(_is_inlined(value) for _, value in _assigned(code)):
            return super().run_pass(state)
        _Tidying(code).run()
        return True


def _apply_rewrites(kind: str, state) -> None:
    """As RewriteRegistry.apply: each rewrite until it matches nothing any more."""
    blocks = state.func_ir.blocks
    for rewrite_class in rewrite_registry.rewrites[kind]:
        rewrite = rewrite_class(state)
        work = list(blocks.items())
        while work:
            label, block = work.pop()
            if rewrite.match(state.func_ir, block, state.typemap, state.calltypes):
                blocks[label] = rewrite.apply()
                work.append((label, blocks[label]))
    _Tidying(state.func_ir).run()


@register_pass(mutates_CFG=True, analysis_only=False)
class _GenericRewrites(GenericRewrites):
    _name = "tilewise_generic_rewrites"

    def run_pass(self, state):
        _apply_rewrites("before-inference", state)
        return True


def _may_rewrite_arrays(state) -> bool:
    """Whether a rewrite that asks for liveness may match: an expression of arrays, a list, or a rewrite not Numba's."""
    if any(not kind.__module__.startswith("numba.") for kind in rewrite_registry.rewrites["after-inference"]):
        return True
    makes_arrays = ("unary", "binop", "inplace_binop", "call", "arrayexpr")
    for name, value in _assigned(state.func_ir):
        if not isinstance(value, ir.Expr):
            continue
        if value.op == "build_list" or (value.op in makes_arrays and isinstance(state.typemap[name], types.Array)):
            return True
    return False


@register_pass(mutates_CFG=True, analysis_only=False)
class _NopythonRewrites(NopythonRewrites):
    _name = "tilewise_nopython_rewrites"

    def run_pass(self, state):
        code = state.func_ir
        if code.is_generator or _may_rewrite_arrays(state):
            return super().run_pass(state)
        _apply_rewrites("after-inference", state)
        return True


@register_pass(mutates_CFG=False, analysis_only=True)
class _Legalization(IRLegalization):
    """The end of a variable's life is where its reference is given back: of no use where none is counted."""

    _name = "tilewise_legalization"

    def run_pass(self, state):
        ir_utils.enforce_no_phis(state.func_ir)
        ir_utils.enforce_no_dels(state.func_ir)
        ends = state.targetctx.enable_nrt or state.flags.debuginfo
        _Tidying(state.func_ir).run(emit_dels=ends, extend_lifetimes=state.flags.dbg_extend_lifetimes)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _ParforFusionPass(ParforFusionPass):
    """Without the copies propagated twice, which is to make loops alike that might be fused; lowering does it once."""

    _name = "tilewise_parfor_fusion"

    def run_pass(self, state):
        if state.flags.auto_parallel.fusion:
            return super().run_pass(state)
        simplify_parfor_body_CFG(state.func_ir.blocks)
        return True


LEAN_PASSES = {
    IRProcessing: _lean(IRProcessing),
    InlineClosureLikes: _InlineClosureLikes,
    GenericRewrites: _GenericRewrites,
    ReconstructSSA: _lean(ReconstructSSA),
    PreLowerStripPhis: _lean(PreLowerStripPhis),
    NopythonRewrites: _NopythonRewrites,
    IRLegalization: _Legalization,
    ParforFusionPass: _ParforFusionPass,
}
