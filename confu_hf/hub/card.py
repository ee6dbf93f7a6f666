"""A pair's card: its metadata for the Hub, and `card.md` filled with what is known of the pair.

What a config knows is enough for a card without figures (`publishing.py`); measured results and what an author says of
data and training come from outside (`examples/make_card.py`). Nothing here measures or uploads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_confu import ConFuConfig

FOLDER = Path(__file__).parent
CONFU, EAGLE3 = "https://arxiv.org/abs/2603.08899", "https://arxiv.org/abs/2503.01840"
INSTALL = "pip install -e .    # in a checkout of confu_hf"


@dataclass(frozen=True)
class CardContent:
    """What a config does not know of its pair; all of it can be left out.

    Attributes:
        base_model: the target's name on the Hub, where the config does not remember it.
        title, introduction, notes: Markdown; the introduction stands under the title, notes behind the usage.
        chat: whether the target answers messages.
        install: the line that installs the package.
        licence: for the metadata, as the Hub abbreviates it. licence_text: for the reader.
        language, datasets: for the metadata; data sets by their names on the Hub.
        tags: beside those that say what kind of a pair it is.
        figures, data, training: Markdown of these sections.
        limits: lines beside those that hold for every pair.
        plot: a picture in the pair's folder.
        evaluations: measured values for `model-index`.
    """

    base_model: str | None = None
    title: str | None = None
    introduction: str | None = None
    notes: Sequence[str] = ()
    chat: bool = False
    install: str = INSTALL
    licence: str | None = None
    licence_text: str | None = None
    language: Sequence[str] = ()
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    figures: str | None = None
    data: str | None = None
    training: str | None = None
    limits: Sequence[str] = ()
    plot: str | None = None
    evaluations: Sequence[EvalResult] = ()


def pair_card(config: ConFuConfig, repository: str, content: CardContent | None = None) -> str:
    """The text of a pair's `README.md`, metadata in front.

    Args:
        repository: what a user passes to `from_pretrained`: a name on the Hub, or a folder.
    """
    content = content or CardContent()
    base = base_model(config, content)
    target = base or "org/target"
    kind = "ConFu pair" if config.contemplate else "EAGLE-3 draft"
    data = ModelCardData(
        **_present(
            language=list(content.language),
            license=content.licence,
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=base,
            base_model_relation="adapter" if base else None,
            datasets=list(content.datasets),
            tags=_tags(config, content),
            metrics=sorted({result.metric_type for result in content.evaluations}),
            eval_results=list(content.evaluations),
            model_name=Path(repository).name if content.evaluations else None,
        )
    )
    card = ModelCard.from_template(
        data,
        template_path=str(FOLDER / "card.md"),
        title=content.title or f"{kind} for {target}",
        introduction=content.introduction or _introduction(config, target),
        install=content.install,
        chat=content.chat,
        target=target,
        target_known=base is not None,
        repository=repository,
        own_embeddings=config.own_embeddings,
        contemplates=config.contemplate,
        notes=content.notes,
        figures=content.figures,
        plot=content.plot,
        data=content.data,
        training=content.training,
        limits=content.limits,
        licence=content.licence_text,
    )
    return str(card).rstrip() + "\n"


def adapter_card(config: ConFuConfig, repository: str, content: CardContent | None = None) -> str:
    """The text of `adapter/README.md` for a pair that contemplates."""
    content = content or CardContent()
    base = base_model(config, content)
    data = ModelCardData(
        **_present(
            license=content.licence,
            library_name="peft",
            base_model=base,
            tags=["confu_hf", "confu", "speculative-decoding"],
        )
    )
    name = (base or "org/target").split("/")[-1]
    fields = {"target_name": name, "repository": repository, "install": content.install}
    card = ModelCard.from_template(data, template_path=str(FOLDER / "adapter_card.md"), **fields)
    return str(card).rstrip() + "\n"


def base_model(config: ConFuConfig, content: CardContent) -> str | None:
    """The target's name on the Hub, if it is known; a folder of some machine is not one."""
    name = content.base_model or config.base_model_name_or_path
    return None if name is None or Path(name).is_dir() else name


def _introduction(config: ConFuConfig, target: str) -> str:
    if config.contemplate:
        what = f"A [ConFu]({CONFU}) pair: a draft model, and an adapter with which the target contemplates."
    else:
        what = f"An [EAGLE-3]({EAGLE3}) draft in the format of confu_hf."
    return f"{what} Makes `generate()` of {target} faster and leaves its text as it is."


def _tags(config: ConFuConfig, content: CardContent) -> list[str]:
    method = ["confu", "peft"] if config.contemplate else []
    tags = ["confu_hf", *method, "eagle-3", "speculative-decoding", "assisted-generation", *content.tags]
    return list(dict.fromkeys(tags))


def _present(**fields: object) -> dict[str, object]:
    """Without the fields that nothing is known of."""
    return {name: value for name, value in fields.items() if value not in (None, [])}
