"""Rosenbrock methods: tableaus in the form of `RosenbrockTableau`."""

import math

import equinox as eqx

from adjoint_jax.solvers.rosenbrock import Rosenbrock, RosenbrockTableau, Row


def _dense(m: Row, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Weights of the dense output y(s) = (1 - s) y0 + s (y1 + (1 - s) (K_1 + s (K_2 + s K_3))), as powers of s, where K_r
    is the sum over i of rows[r - 1][i] * u_i: it comes with s^r - s^(r + 1)."""
    return tuple(
        tuple(now - before for now, before in zip((*column, 0.0), (-weight, *column), strict=True))
        for weight, column in zip(m, zip(*rows, strict=True), strict=True)
    )


_D = 1 / (2 + math.sqrt(2))
_E = 6 + math.sqrt(2)


class Rosenbrock23(Rosenbrock):
    """Shampine and Reichelt's modified Rosenbrock triple: order 2(3), L-stable, three stages, dense output of order 2.

    For loose tolerances. L. F. Shampine and M. W. Reichelt, "The MATLAB ODE suite", SIAM J. Sci. Comput. 18 (1997), section
    3; the third stage serves the error estimate alone.
    """

    tableau: RosenbrockTableau = eqx.field(
        static=True,
        kw_only=True,
        default=RosenbrockTableau(
            name="Rosenbrock23",
            order=2,
            gamma=_D,
            a=((), (1 / (2 * _D),), (1 / _D, 1 / _D)),
            c=((), (-1 / _D,), (-2 / _D, -_E / _D)),
            alpha=(0.0, 1 / 2, 1.0),
            gammas=(_D, 0.0, -_D),
            m=(1 / _D, 1 / _D, 0.0),
            error=(1 / (6 * _D), (_E - 2) / (6 * _D), 1 / (6 * _D)),
            error_order=2,
            dense=((1 / _D, 0.0), (-2 / (1 - 2 * _D), 1 / ((1 - 2 * _D) * _D)), (0.0, 0.0)),
            dense_order=2,
        ),
    )


_RODAS4_LAST = (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.687886036105895)


class Rodas4(Rosenbrock):
    """Rodas: order 4(3), stiffly accurate, L-stable, six stages, dense output of order 3; also for index-1 DAEs.

    E. Hairer and G. Wanner, "Solving Ordinary Differential Equations II", 2nd edition, section VI.4, and their code RODAS.
    """

    tableau: RosenbrockTableau = eqx.field(
        static=True,
        kw_only=True,
        default=RosenbrockTableau(
            name="Rodas4",
            order=4,
            gamma=0.25,
            a=(
                (),
                (1.544,),
                (0.9466785280815826, 0.2557011698983284),
                (3.314825187068521, 2.896124015972201, 0.9986419139977817),
                _RODAS4_LAST,
                (*_RODAS4_LAST, 1.0),
            ),
            c=(
                (),
                (-5.6688,),
                (-2.430093356833875, -0.2063599157091915),
                (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
                (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.7089089320616),
                (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
            ),
            alpha=(0.0, 0.386, 0.21, 0.63, 1.0, 1.0),
            gammas=(0.25, -0.1043, 0.1035, -0.0362, 0.0, 0.0),
            m=(*_RODAS4_LAST, 1.0, 1.0),
            error=(0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
            error_order=3,
            dense=_dense(
                (*_RODAS4_LAST, 1.0, 1.0),
                (
                    (10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823, 1.025137723295662, 0.0),
                    (-0.6762803392801253, 6.087714651680015, 16.43084320892478, 24.76722511418386, -6.594389125716872, 0.0),
                ),
            ),
            dense_order=3,
        ),
    )


_RODAS5P_LAST = (
    -7.502846399306121,
    2.561846144803919,
    -11.627539656261098,
    -0.18268767659942256,
    0.030198172008377946,
)


class Rodas5P(Rosenbrock):
    """Rodas5P: order 5(4), stiffly accurate, L-stable, eight stages, dense output of order 4; also for index-1 DAEs. The
    first choice for stiff problems of up to some hundred states.

    G. Steinebach, "Construction of Rosenbrock-Wanner method Rodas5P and numerical benchmarks within the Julia Differential
    Equations package", BIT 63 (2023).
    """

    tableau: RosenbrockTableau = eqx.field(
        static=True,
        kw_only=True,
        default=RosenbrockTableau(
            name="Rodas5P",
            order=5,
            gamma=0.21193756319429014,
            a=(
                (),
                (3.0,),
                (2.849394379747939, 0.45842242204463923),
                (-6.954028509809101, 2.489845061869568, -10.358996098473584),
                (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
                _RODAS5P_LAST,
                (*_RODAS5P_LAST, 1.0),
                (*_RODAS5P_LAST, 1.0, 1.0),
            ),
            c=(
                (),
                (-14.155112264123755,),
                (-17.97296035885952, -2.859693295451294),
                (147.12150275711716, -1.41221402718213, 71.68940251302358),
                (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
                (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
                (
                    30.91273214028599,
                    -3.1208243349937974,
                    77.79954646070892,
                    34.28646028294783,
                    -19.097331116725623,
                    -28.087943162872662,
                ),
                (
                    37.80277123390563,
                    -3.2571969029072276,
                    112.26918849496327,
                    66.9347231244047,
                    -40.06618937091002,
                    -54.66780262877968,
                    -9.48861652309627,
                ),
            ),
            alpha=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
            gammas=(
                0.21193756319429014,
                -0.42387512638858027,
                -0.3384627126235924,
                1.8046452872882734,
                2.325825639765069,
                0.0,
                0.0,
                0.0,
            ),
            m=(*_RODAS5P_LAST, 1.0, 1.0, 1.0),
            error=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
            error_order=4,
            dense=_dense(
                (*_RODAS5P_LAST, 1.0, 1.0, 1.0),
                (
                    (
                        25.948786856663858,
                        -2.5579724845846235,
                        10.433815404888879,
                        -2.3679251022685204,
                        0.524948541321073,
                        1.1241088310450404,
                        0.4272876194431874,
                        -0.17202221070155493,
                    ),
                    (
                        -9.91568850695171,
                        -0.9689944594115154,
                        3.0438037242978453,
                        -24.495224566215796,
                        20.176138334709044,
                        15.98066361424651,
                        -6.789040303419874,
                        -6.710236069923372,
                    ),
                    (
                        11.419903575922262,
                        2.8879645146136994,
                        72.92137995996029,
                        80.12511834622643,
                        -52.072871366152654,
                        -59.78993625266729,
                        -0.15582684282751913,
                        4.883087185713722,
                    ),
                ),
            ),
            dense_order=4,
        ),
    )
