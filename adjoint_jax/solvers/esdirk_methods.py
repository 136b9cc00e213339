"""Diagonally implicit and additive Runge-Kutta methods: their tableaus."""

import equinox as eqx
import numpy as np

from adjoint_jax.solvers.additive_runge_kutta import AdditiveRungeKutta
from adjoint_jax.solvers.implicit_runge_kutta import ESDIRK, ESDIRKTableau, Row

# Dense outputs satisfy, for every s, the conditions of their order, and one more:
#
#     beta_1(s) = w(s) a,   w(s) = (beta_2(s), ..., beta_s(s)) A^-1,
#
# where a is the first column and A the rest of the implicit stages' coefficients. The dense output is then y(s) = y +
# sum_i w_i(s) (Y_i - y), without the slope k_1. It stays bounded for infinitely stiff components, like the step itself,
# while the slope at a step's start, and with it Hermite's interpolant, has rounding errors multiplied by the eigenvalue.
# What freedom is left makes the derivative at the end that of the last stage, and the next order's conditions almost hold;
# for KenCarp4, it makes the conditions of the explicit part hold too, and those of the next order almost.

_G = 0.43586652150845899942
"""The root of g^3 - 3 g^2 + 3/2 g - 1/6 = 0 between 0.4 and 0.5."""


def _kvaerno3() -> ESDIRKTableau:
    g = _G
    embedded = ((-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g))
    last = ((6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g**2 + 6 * g - 1) / (6 * g - 3))
    return ESDIRKTableau(
        name="Kvaerno3",
        order=3,
        gamma=g,
        a=((), (g,), embedded, last),
        c=(0.0, 2 * g, 1.0, 1.0),
        error=(last[0] - embedded[0], last[1] - embedded[1], last[2] - g, g),
        error_order=2,
        dense=(
            (1.0, -1.07357009006976043, 0.3823800600465069533),
            (0.0, 4.4716901652653417119, -2.9811267768435611413),
            (1.0452602553351021418, -5.7962401503911625639, 3.5157400151490743286),
            (-1.0452602553351021418, 2.3981200751955812819, -0.91699329835202014067),
        ),
        dense_order=3,
    )


class Kvaerno3(ESDIRK):
    """Kværnø's method of order 3(2): L-stable, stiffly accurate, four stages (three implicit), dense output of order 3.

    For loose tolerances. A. Kværnø, "Singly diagonally implicit Runge-Kutta methods with an explicit first stage", BIT 44
    (2004).
    """

    tableau: ESDIRKTableau = eqx.field(static=True, kw_only=True, default=_kvaerno3())


_KVAERNO5_EMBEDDED = (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676)
_KVAERNO5_LAST = (
    0.13659751177640291,
    0.0,
    -0.05496908796538376,
    -0.04118626728321046,
    0.62993304899016403,
    0.06962479448202728,
)


class Kvaerno5(ESDIRK):
    """Kværnø's method of order 5(4): L-stable, stiffly accurate, seven stages (six implicit), dense output of order 4.

    Its third stage lies beyond the step's end, by 0.23 of the step: the field is evaluated up to there, also behind t1 and
    behind jumps. Take `KenCarp4` where that must not be. A. Kværnø, "Singly diagonally implicit Runge-Kutta methods with an
    explicit first stage", BIT 44 (2004).
    """

    tableau: ESDIRKTableau = eqx.field(
        static=True,
        kw_only=True,
        default=ESDIRKTableau(
            name="Kvaerno5",
            order=5,
            gamma=0.26,
            a=(
                (),
                (0.26,),
                (0.13, 0.84033320996790809),
                (0.22371961478320505, 0.47675532319799699, -0.06470895363112615),
                (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998),
                _KVAERNO5_EMBEDDED,
                _KVAERNO5_LAST,
            ),
            c=(0.0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1.0, 1.0),
            error=tuple(np.subtract((*_KVAERNO5_LAST, 0.26), (*_KVAERNO5_EMBEDDED, 0.26, 0.0)).tolist()),
            error_order=4,
            dense=(
                (0.985045352180053388, -2.07081523930592016, 1.73288446917729178, -0.510517070275022107),
                (0.0, 0.0, 0.0, 0.0),
                (-0.0955480261649983113, 0.850534137282503597, -1.63430054793154738, 0.824345348848658309),
                (-0.501209830799792427, -0.625618277409802766, 2.59012097808614088, -1.50447913715975617),
                (0.0801798531478903974, 3.25037514601714912, -4.22155765551731304, 1.52093570534243766),
                (-0.117004963771151974, -0.121790038209084664, 0.873094145659734507, -0.564674349197470548),
                (0.648537615407998923, -1.28268572837484489, 0.659758610525693073, 0.234389502441152913),
            ),
            dense_order=4,
        ),
    )


_KENCARP4_LAST = (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211)
_KENCARP4_EMBEDDED = (
    4586570599 / 29645900160,
    0.0,
    178811875 / 945068544,
    814220225 / 1159782912,
    -3700637 / 11593932,
    61727 / 225920,
)


_KENCARP4_EXPLICIT: tuple[Row, ...] = (
    (),
    (1 / 2,),
    (13861 / 62500, 6889 / 62500),
    (-116923316275 / 2393684061468, -2731218467317 / 15368042101831, 9408046702089 / 11113171139209),
    (
        -451086348788 / 2902428689909,
        -2682348792572 / 7519795681897,
        12662868775082 / 11960479115383,
        3355817975965 / 11060851509271,
    ),
    (
        647845179188 / 3216320057751,
        73281519250 / 8382639484533,
        552539513391 / 3454668386233,
        3354512671639 / 8306763924573,
        4040 / 17871,
    ),
)


class KenCarp4(AdditiveRungeKutta):
    """Kennedy and Carpenter's ARK4(3)6L[2]SA, for fields `Split(explicit, implicit)` and, its implicit part alone, for all
    others: order 4(3), L-stable and (implicit alone) stiffly accurate, six stages (five implicit) that all lie inside the
    step, dense output of order 3.

    C. A. Kennedy and M. H. Carpenter, "Additive Runge-Kutta schemes for convection-diffusion-reaction equations", Applied
    Numerical Mathematics 44 (2003).
    """

    tableau: ESDIRKTableau = eqx.field(
        static=True,
        kw_only=True,
        default=ESDIRKTableau(
            name="KenCarp4",
            order=4,
            gamma=0.25,
            a=(
                (),
                (0.25,),
                (8611 / 62500, -1743 / 31250),
                (5012029 / 34652500, -654441 / 2922500, 174375 / 388108),
                (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912),
                _KENCARP4_LAST,
            ),
            c=(0.0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1.0),
            error=tuple(np.subtract((*_KENCARP4_LAST, 0.25), _KENCARP4_EMBEDDED).tolist()),
            error_order=3,
            dense=(
                (0.730872380739355666, -1.01230903749704354, 0.439352951919359223),
                (0.0, 0.0, 0.0),
                (0.963655850669485762, -1.348474666651156, 0.571577756505671003),
                (-1.1978212322712867, 4.60031212729732962, -2.72192559971670834),
                (0.537183861843445272, -2.23352329035313009, 1.42109889751467812),
                (-0.033890860981, -0.006005132796, 0.289895993777),
            ),
            dense_order=3,
        ),
    )
    explicit: tuple[Row, ...] = eqx.field(static=True, kw_only=True, default=_KENCARP4_EXPLICIT)
