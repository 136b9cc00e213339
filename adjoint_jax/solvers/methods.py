"""Explicit Runge-Kutta methods of order one to five."""

import equinox as eqx

from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.tableau import ButcherTableau


class Euler(ExplicitRungeKutta):
    """Explicit Euler: order 1, one stage, no error estimate, dense output of order 1 (a straight line)."""

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(name="Euler", order=1, a=((),), b=(1.0,), c=(0.0,), dense=((1.0,),), dense_order=1),
    )


class Midpoint(ExplicitRungeKutta):
    """Explicit midpoint method: order 2(1), two stages, Euler embedded, dense output of order 2.

    Not first-same-as-last. The dense output is the only quadratic of order 2 in these stages; successive steps join
    continuously, but not smoothly. Coefficients: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations
    I, 2nd edition, table II.1.1 (there under the name of Runge).
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="Midpoint",
            order=2,
            a=((), (1 / 2,)),
            b=(0.0, 1.0),
            c=(0.0, 1 / 2),
            dense=((1.0, -1.0), (0.0, 1.0)),
            dense_order=2,
            b_error=(-1.0, 1.0),
            error_order=1,
        ),
    )


class Heun(ExplicitRungeKutta):
    """Heun's method, the explicit trapezoidal rule: order 2(1), two stages, Euler embedded, dense output of order 2.

    Not first-same-as-last. The dense output is the only quadratic of order 2 in these stages; successive steps join
    continuously, but not smoothly.
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="Heun",
            order=2,
            a=((), (1.0,)),
            b=(1 / 2, 1 / 2),
            c=(0.0, 1.0),
            dense=((1.0, -1 / 2), (0.0, 1 / 2)),
            dense_order=2,
            b_error=(-1 / 2, 1 / 2),
            error_order=1,
        ),
    )


class Ralston(ExplicitRungeKutta):
    """Ralston's two-stage method: order 2(1), Euler embedded, dense output of order 2.

    Its second node, 2/3, gives the smallest bound on the error among two-stage methods of order 2. Not
    first-same-as-last. The dense output is the only quadratic of order 2 in these stages; successive steps join
    continuously, but not smoothly. Source: Ralston, Runge-Kutta methods with minimum error bounds, Mathematics of
    Computation 16 (1962).
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="Ralston",
            order=2,
            a=((), (2 / 3,)),
            b=(1 / 4, 3 / 4),
            c=(0.0, 2 / 3),
            dense=((1.0, -3 / 4), (0.0, 3 / 4)),
            dense_order=2,
            b_error=(-3 / 4, 3 / 4),
            error_order=1,
        ),
    )


class Bosh3(ExplicitRungeKutta):
    """Bogacki and Shampine's pair: order 3(2), four stages, first-same-as-last, dense output of order 3.

    The dense output is the cubic Hermite polynomial, which needs no stage of its own and is continuously
    differentiable across steps. Source: Bogacki and Shampine, A 3(2) pair of Runge-Kutta formulas, Applied Mathematics
    Letters 2 (1989).
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="Bosh3",
            order=3,
            a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
            b=(2 / 9, 1 / 3, 4 / 9, 0.0),
            c=(0.0, 1 / 2, 3 / 4, 1.0),
            dense=((1.0, -4 / 3, 5 / 9), (0.0, 1.0, -2 / 3), (0.0, 4 / 3, -8 / 9), (0.0, -1.0, 1.0)),
            dense_order=3,
            b_error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
            error_order=2,
        ),
    )


class RK4(ExplicitRungeKutta):
    """The classical Runge-Kutta method: order 4, four stages, no error estimate, dense output of order 3.

    Not first-same-as-last. The dense output is the only one of order 3 in these stages; without further stages order 4
    is out of reach. Its local error, O(h^4), matches the global error of the steps; successive steps join continuously,
    but not smoothly. Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 2nd edition, table
    II.1.2 and section II.6.
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="RK4",
            order=4,
            a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
            b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
            c=(0.0, 1 / 2, 1 / 2, 1.0),
            dense=((1.0, -3 / 2, 2 / 3), (0.0, 1.0, -2 / 3), (0.0, 1.0, -2 / 3), (0.0, -1 / 2, 2 / 3)),
            dense_order=3,
        ),
    )


_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)


class Dopri5(ExplicitRungeKutta):
    """Dormand and Prince's pair: order 5(4), seven stages, first-same-as-last, dense output of order 4.

    The dense output needs no stage of its own and is continuously differentiable across steps. Sources: the pair is
    RK5(4)7M of Dormand and Prince, A family of embedded Runge-Kutta formulae, Journal of Computational and Applied
    Mathematics 6 (1980); the dense output is the quartic that Shampine, Some practical Runge-Kutta formulas,
    Mathematics of Computation 46 (1986), chose for its small error.
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="Dopri5",
            order=5,
            a=(
                (),
                (1 / 5,),
                (3 / 40, 9 / 40),
                (44 / 45, -56 / 15, 32 / 9),
                (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
                (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
                _DOPRI5_B,
            ),
            b=(*_DOPRI5_B, 0.0),
            c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
            dense=(
                (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
                (0.0, 0.0, 0.0, 0.0),
                (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
                (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
                (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
                (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
                (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
            ),
            dense_order=4,
            b_error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
            error_order=4,
        ),
    )


_TSIT5_B = (
    0.09646076681806522951817,
    1 / 100,
    0.4798896504144995747752,
    1.379008574103741893192,
    -3.290069515436080679902,
    2.324710524099773982415,
)


class Tsit5(ExplicitRungeKutta):
    """Tsitouras' pair: order 5(4), seven stages, first-same-as-last, dense output of order 4.

    The dense output needs no stage of its own and is continuously differentiable across steps; its weights are the
    published ones, multiplied out. Source: Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column
    simplifying assumption, Computers and Mathematics with Applications 62 (2011).
    """

    tableau: ButcherTableau = eqx.field(
        static=True,
        default=ButcherTableau(
            name="Tsit5",
            order=5,
            a=(
                (),
                (161 / 1000,),
                (-0.008480655492356988544427, 0.3354806554923569885444),
                (2.897153057105493432130, -6.359448489975074843148, 4.362295432869581411018),
                (
                    5.325864828439256604429,
                    -11.74888356406282787775,
                    7.495539342889836208305,
                    -0.09249506636175524925651,
                ),
                (
                    5.861455442946420028659,
                    -12.92096931784710929171,
                    8.159367898576158643180,
                    -0.07158497328140099722453,
                    -0.02826905039406838290900,
                ),
                _TSIT5_B,
            ),
            b=(*_TSIT5_B, 0.0),
            c=(0.0, 161 / 1000, 327 / 1000, 9 / 10, 0.9800255409045096857298, 1.0, 1.0),
            dense=(
                (1.0, -2.7637061972748259113, 2.9132554618219127438, -1.0530884977290216),
                (0.0, 0.1317, -0.2234, 0.1017),
                (0.0, 3.9302962368947515285, -5.9410338721315047347, 2.490627285651252793),
                (0.0, -12.411077166933676984, 30.338188630282321598, -16.54810288924490272),
                (0.0, 37.509313416511039195, -88.178904894766401101, 47.37952196281928122),
                (0.0, -27.896526289197287792, 65.091894674793671515, -34.87065786149660974),
                (0.0, 3 / 2, -4.0, 5 / 2),
            ),
            dense_order=4,
            b_error=(
                _TSIT5_B[0] - 0.09468075576583945807479,
                _TSIT5_B[1] - 0.009183565540343253096776,
                _TSIT5_B[2] - 0.4877705284247615707856,
                _TSIT5_B[3] - 1.234297566930478985655,
                _TSIT5_B[4] + 2.707712349983525454881,
                _TSIT5_B[5] - 1.866628418170587035754,
                -1 / 66,
            ),
            error_order=4,
        ),
    )


METHODS = (Euler, Midpoint, Heun, Ralston, Bosh3, RK4, Dopri5, Tsit5)
