"""Who takes part, by the names that tables use. Settings are in `libraries/`."""

from benchmarks.cases import Contestant, Role


class _Entrants:
    """Makes contestants of one library."""

    def __init__(self, distribution: str, role: Role, prefix: str, module: str):
        self.distribution, self.role, self.prefix, self.module = distribution, role, prefix, module

    def __call__(self, settings: str, entry: str) -> Contestant:
        return Contestant(f"{self.prefix} {settings}".strip(), self.distribution, self.role, f"{self.module}:{entry}")


_ours = _Entrants("adjoint_jax", Role.OURS, "adjoint_jax", "ours")
DISCRETE = _ours("Discrete", "discrete")
DISCRETE_BOUNDED = _ours("Discrete, max_steps given", "discrete_bounded")
DISCRETE_RK4 = _ours("Discrete", "discrete_rk4")
LINEARISATIONS = _ours("Discrete, linearisations", "linearisations")
LINEARISATIONS_RK4 = _ours("Discrete, linearisations", "linearisations_rk4")
CHECKPOINTS_RK4 = _ours("Discrete, √N checkpoints", "square_root_checkpoints_rk4")
GAUSS = _ours("Gauss", "gauss")
BACKSOLVE = _ours("Backsolve", "backsolve")
BACKSOLVE_RK4 = _ours("Backsolve", "backsolve_rk4")
REVERSIBLE_RK4 = _ours("Reversible", "reversible_rk4")
RODAS5P = _ours("Rodas5P", "rodas5p")
KVAERNO5 = _ours("Kvaerno5", "kvaerno5")
FORWARD_MODE = _ours("ForwardMode", "forward_mode")

_diffrax = _Entrants("diffrax", Role.PEER, "diffrax", "of_diffrax")
DIFFRAX = _diffrax("default", "default")
DIFFRAX_RK4 = _diffrax("default", "default_rk4")
DIFFRAX_TUNED = _diffrax("tuned", "tuned")
DIFFRAX_TUNED_RK4 = _diffrax("tuned", "tuned_rk4")
DIFFRAX_TUPLE = _diffrax("tuned, tuple state", "tuned_tuple")
DIFFRAX_BACKSOLVE = _diffrax("Backsolve", "backsolve")
DIFFRAX_BACKSOLVE_RK4 = _diffrax("Backsolve", "backsolve_rk4")
DIFFRAX_FORWARD_MODE = _diffrax("ForwardMode", "forward_mode")
DIFFRAX_KVAERNO5 = _diffrax("Kvaerno5", "kvaerno5")
DIFFRAX_KVAERNO5_NEWTON = _diffrax("Kvaerno5, tuned", "kvaerno5_newton")
DIFFRAX_KVAERNO5_FORWARD_MODE = _diffrax("Kvaerno5, ForwardMode", "kvaerno5_forward_mode")

JAX_ODE = Contestant("jax.experimental.ode", "jax", Role.PEER, "of_jax:default")

_gradsolve = _Entrants("gradsolve", Role.PEER, "gradsolve", "of_gradsolve")
GRADSOLVE = _gradsolve("", "default")
GRADSOLVE_RK4 = _gradsolve("", "rk4")
GRADSOLVE_TSIT5 = _gradsolve("", "tsit5")

_torchdiffeq = _Entrants("torchdiffeq", Role.PEER, "torchdiffeq", "of_torchdiffeq")
TORCHDIFFEQ = _torchdiffeq("", "backpropagation")
TORCHODE = Contestant("torchode", "torchode", Role.PEER, "of_torchode:backpropagation")

_scipy = _Entrants("scipy", Role.PEER, "SciPy", "of_scipy")
LSODA = _scipy("LSODA", "lsoda")
DOP853 = _scipy("DOP853", "dop853")
CVODES_BDF = Contestant("CVODES BDF (casadi)", "casadi", Role.PEER, "of_casadi:bdf")
DIFFSOL = Contestant("diffsol BDF", "diffsol-jax", Role.PEER, "of_diffsol:bdf")
CVODES = Contestant("CVODES (casadi)", "casadi", Role.PEER, "of_casadi:adams")

_bare = _Entrants("jax", Role.BARE, "bare", "bare")
BARE_RK4 = _bare("scan", "rk4_plain")
BARE_RK4_REMAT = _bare("scan, remat", "rk4_remat")
BARE_RK4_SQUARE_ROOT = _bare("scan, √N remat", "rk4_square_root")
BARE_TSIT5 = _bare("scan", "tsit5_plain")
BARE_TSIT5_REMAT = _bare("scan, remat", "tsit5_remat")
BARE_LANES = _bare("loop over lanes", "lanes")
BARE_ADJOINT = _Entrants("jax", Role.BARE, "bare", "bare_adjoint")("loops, transposed steps", "adaptive")
BARE_SEGMENTS = _Entrants("jax", Role.BARE, "bare", "bare_segments")("the same in segments", "adaptive")

IMPORTED = (
    Contestant("adjoint_jax", "adjoint_jax", Role.OURS, "adjoint_jax"),
    Contestant("diffrax", "diffrax", Role.PEER, "diffrax"),
    Contestant("jax.experimental.ode", "jax", Role.PEER, "jax.experimental.ode"),
    Contestant("gradsolve", "gradsolve", Role.PEER, "gradsolve"),
)
