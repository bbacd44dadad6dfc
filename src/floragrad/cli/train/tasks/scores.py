"""Scores of generated texts, each with one reference."""

from collections.abc import Sequence
from statistics import fmean
from typing import Final

ROUGES: Final = ("rouge1", "rouge2", "rougeL")


def bleu(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return sacreBLEU's BLEU of a corpus, in percent."""
    import sacrebleu

    return {"bleu": sacrebleu.corpus_bleu(texts, [references]).score}


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGES, use_stemmer=True)
    found = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: 100 * fmean(each[name].fmeasure for each in found) for name in ROUGES}
