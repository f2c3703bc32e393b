"""What an evaluation's numbers say about a run that goes wrong: a sentence each, or None."""

SEE = "docs/your-pictures.md, Is my run all right?"


def codebook(values):
    """The tokenizer uses hardly any of its codes."""
    if values["codebook_perplexity"] < 8:
        return f"few codes are used (perplexity {values['codebook_perplexity']:.1f}): {SEE}"
    return None


def masked_tokens(values):
    """Pre-training has learnt no more than how often each token occurs."""
    loss, entropy = values["mim_loss"], values.get("token_entropy", float("inf"))
    if loss > entropy - 0.02:
        return (
            f"the loss {loss:.2f} is no better than that of always predicting the tokens' shares "
            f"({entropy:.2f}): {SEE}"
        )
    return None
