"""Momentum for few bits.

Error feedback sends parts of a gradient later, and momentum delays them again. Both together
overshoot, with few bits and much momentum up to divergence. The rule multiplies β1 by the part of the
energy of a normal distribution that both quantizers transmit,
:attr:`~effadam_hook.wire.quantizers.Quantizer.energy`: .98 for ``lloyd4``, .78 for ``lloyd2``, .41 for
``sign``. It is empirical; docs/algorithm.md has the measurements.
"""

from __future__ import annotations

from effadam_hook.wire.quantizers import get_quantizer

__all__ = ["reduced_betas"]


def reduced_betas(
    betas: tuple[float, float], worker_quantizer: str, server_quantizer: str | None = None
) -> tuple[float, float]:
    """Return the betas of Adam that suit few bits, from those of training without quantization.

    For gradient and preconditioned gradient mode, whose optimizer is the user's. Update mode with
    ``second_moment="matched"`` applies the rule itself.

    Args:
        betas: β1 and β2 of training without quantization, such as ``(0.9, 0.999)``.
        worker_quantizer: The quantizer of both directions, or that of the uplink.
        server_quantizer: The quantizer of the downlink; that of the uplink by default.

    Returns:
        β1 times the energy that both quantizers transmit, rounded to two digits, or to three if β1 is
        above .95; and β2.

    Raises:
        TypeError: If ``betas`` are not two numbers.
        ValueError: If β1 is not in [0, 1), or a quantizer is unknown.

    Examples:
        >>> reduced_betas((0.9, 0.999), "lloyd2")
        (0.7, 0.999)
        >>> optimizer = AdamW(model.parameters(), betas=reduced_betas((0.9, 0.999), "lloyd2"))
    """
    try:
        beta1, beta2 = (float(beta) for beta in betas)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Invalid betas: {betas!r}. Must be two numbers, such as (0.9, 0.999)."
        ) from error
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"Invalid betas: {betas}. The first must be in [0, 1).")
    uplink = get_quantizer(worker_quantizer)
    downlink = uplink if server_quantizer is None else get_quantizer(server_quantizer)
    energy = uplink.energy * downlink.energy
    if energy == 1.0:
        return beta1, beta2
    return min(beta1, round(beta1 * energy, 2 if beta1 <= 0.95 else 3)), beta2
