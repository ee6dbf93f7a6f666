"""`ConFuAssistant`: a draft, its adapter, and the target they are attached to; what `assistant_model=` takes.

A life: loaded or made fresh, attached to a target, used, detached, saved. Files are `hub/pair.py`'s, the adapter's way
onto a target `adapter/attachment.py`'s, the route of `generate` into the decoding loop `routing.py`'s, the checks
before a generation starts `checks.py`'s.
"""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import compat
from ..adapter.attachment import Attachment, LooseAdapter, attach_adapter, base_model
from ..adapter.config import ConFuAdapterConfig
from ..adapter.tuner import on_injection
from ..configuration_confu import ConFuConfig
from ..decoding.contemplation import Contemplator
from ..decoding.drafting import Drafter, NetworkDrafter
from ..decoding.lookup import CombinedDrafter
from ..decoding.replay import TreeReplay
from ..decoding.stats import GenerationStats
from ..errors import refusal
from ..hub.fingerprint import check_identity, remember_target
from ..hub.pair import read_pair, write_pair
from ..hub.publishing import publish
from ..modeling_confu import ConFuDraftModel
from ..options import ConFuGenerationConfig, TreeOptions
from ..target.support import check_supported
from .checks import check_adapter, check_pair, confu_layer
from .compiling import CompilesProducts
from .policies import DecidesRounds
from .routing import release, route, serve

ADAPTER_FIELDS = (
    "num_virtual_tokens",
    "soft_prompt_type",
    "num_experts",
    "num_experts_per_token",
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
)
PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "tags")


on_injection(route)


class ConFuAssistant(compat.OnlyRouted, CompilesProducts, DecidesRounds, ConFuDraftModel):
    """The assistant: a draft, its adapter, and the target they are attached to.

        confu = ConFuAssistant.from_pretrained("org/confu-target", target=model)
        model.generate(**inputs, assistant_model=confu)
        confu.stats.mean_accepted_length
        confu.detach()  # model is as it was

    The method is that of arXiv 2603.08899 (ConFu), with `contemplate=False` that of arXiv 2503.01840 (EAGLE-3).
    What cannot work is refused with a `ValueError` before a generation starts: what was got, what was expected, what to
    do; the target is untouched then.

    Attributes:
        generation_config: the tree options, a [`ConFuGenerationConfig`]; each can be an argument of `generate`.
        stats: what the last call did, a [`GenerationStats`]; None before the first.
        target: the model that it is attached to, or None.
        costs: what `policy="auto"` goes by, in seconds; None = it measures.
    """

    def __init__(self, config: ConFuConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.generation_config = ConFuGenerationConfig(contemplate=config.contemplate)
        self._attachment: Attachment | None = None
        self._adapter: LooseAdapter | None = None
        self._stats: GenerationStats | None = None

    @property
    def stats(self) -> GenerationStats | None:
        """Statistics of the last `generate` call with this assistant; None before the first."""
        return self._stats

    @stats.setter
    def stats(self, stats: GenerationStats) -> None:
        self._stats = stats

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args: Any,
        target: PreTrainedModel | PeftModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> ConFuAssistant:
        """Load a draft and its adapter, or an EAGLE-3 draft of another project.

        Args:
            pretrained_model_name_or_path: a folder that [`save_pretrained`] wrote, or a repository on the Hub.
            target: attach to this model, in place; the draft takes its dtype and device, unless `dtype` or
                `device_map` is given. Without it, call [`attach`] later, or load the adapter with PEFT. Drafts of other
                projects need it.
            tokenizer: the target's; held against the vocabulary that the draft was made for, if it remembers one.
            **kwargs: of `PreTrainedModel.from_pretrained`: `revision`, `subfolder`, `token`, `cache_dir`, `dtype`, ...;
                fields of the config to override; `allow_pickle=True` to read a foreign draft's `pytorch_model.bin`.

        Returns:
            The assistant, attached if a `target` was given; with `output_loading_info=True` also what was loaded.

        Raises:
            OSError: the name leads nowhere; as a `FileNotFoundError` where a file is missing.
            ValueError: files are corrupted, incomplete or not finite, or the pair was made for another target.
                The target is untouched in either case.

        Warns of a target that has the right shapes and other weights than the one that the draft was made for.
        """
        path = pretrained_model_name_or_path
        report = kwargs.pop("output_loading_info", False)
        embedding = None
        if target is not None:
            target = base_model(target)
            embedding = target.get_input_embeddings().weight
            if not {"dtype", "torch_dtype"} & set(kwargs) and embedding.is_floating_point():
                kwargs["dtype"] = embedding.dtype
        pair = read_pair(path, adapter_required=target is not None, target=target, **kwargs)
        assistant, info = super().from_pretrained(
            None, *model_args, config=pair.config, state_dict=pair.weights, output_loading_info=True, **pair.arguments
        )
        assistant.config.name_or_path = str(path)
        assistant.generation_config, assistant._adapter = pair.generation_config, pair.adapter
        if target is not None:
            device = compat.working_device(target)
            if kwargs.get("device_map") is None and device.type != "meta":
                assistant.to(device)
            assistant.attach(target, tokenizer)
        return (assistant, info) if report else assistant

    @classmethod
    def from_target(cls, model: PreTrainedModel | PeftModel, **config: Any) -> ConFuAssistant:
        """A fresh, untrained pair for a target, attached: the start of training, and of tests.

        Args:
            model: the target; the draft takes its dtype and device.
            **config: fields of [`ConFuConfig`], and those of [`ConFuAdapterConfig`] that are in `ADAPTER_FIELDS`.

        Raises:
            ValueError: the model cannot be a target, or a field makes no sense.
        """
        target = base_model(model)
        check_supported(target)
        adapter_fields = {name: config.pop(name) for name in ADAPTER_FIELDS if name in config}
        assistant = cls(ConFuConfig.from_target_config(target.config, **config)).eval()
        embedding = target.get_input_embeddings().weight
        device = compat.working_device(target)
        assistant.to(device, dtype=embedding.dtype if embedding.is_floating_point() else target.dtype)
        if assistant.config.contemplate:
            adapter = ConFuAdapterConfig(
                target_layer_ids=assistant.config.target_layer_ids,
                initializer_range=assistant.config.initializer_range,
                base_model_name_or_path=compat.name_or_path(target.config),
                **adapter_fields,
            )
            assistant._adapter = LooseAdapter(adapter)
        return assistant.attach(target)

    def attach(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> ConFuAssistant:
        """Put the adapter on a target and route its `generate` here. Again on the same target: changes nothing.

        An adapter that PEFT loaded onto the target is used if this assistant brings none of its own.

        Args:
            model: the target that the pair was made for, or a `PeftModel` of it.
            tokenizer: the target's; held against the vocabulary that the draft was made for, if it remembers one.

        Returns:
            The assistant itself.

        Raises:
            ValueError: the pair was made for another target, the model cannot be one, or the assistant is attached to
                another; the model is untouched.
        """
        target, attached = base_model(model), self.target
        if attached is target:
            return self
        if attached is not None:
            raise refusal(
                "confu.attach",
                got="an assistant that is attached to another model",
                expected="a free one",
                fix="Call confu.detach() first, or load a second assistant.",
            )
        check_supported(target)
        check_pair(self.config, target)
        check_identity(self.config, target, tokenizer)
        adapter = self._loose_adapter()
        if self.config.contemplate and adapter is not None:
            self._attachment = attach_adapter(target, adapter)
        elif self.config.contemplate:
            check_adapter(self.config, target)
            layer = confu_layer(target)
            self._attachment = Attachment(weakref.ref(target), layer, layer.current)
        else:
            self._attachment = Attachment(weakref.ref(target))
        self._adapter = None
        serve(target, self)
        return self

    def detach(self) -> PreTrainedModel | None:
        """Give the target back as it was before [`attach`], and return it. The adapter stays with the assistant."""
        attachment, target = self._attachment, self.target
        self._adapter, self._attachment = self._loose_adapter(), None
        self.products = None
        if target is None:
            return None
        attachment.undo()
        release(target, self)
        return target

    @property
    def target(self) -> PreTrainedModel | None:
        """The model that this assistant is attached to, if any."""
        return None if self._attachment is None else self._attachment.target

    def new_drafter(self, target: PreTrainedModel, options: TreeOptions) -> Drafter:
        """Who drafts in one call of `generate`. Override it to draft in another way.

        Args:
            target: the model that verifies.
            options: the tree options of this call.
        """
        network = NetworkDrafter(self, self.input_embeddings(target.get_input_embeddings()))
        memory = self.answer_memory(options)
        return CombinedDrafter(network, memory) if options.lookup else network

    def contemplator(self, target: PreTrainedModel) -> Contemplator:
        """Contemplation with this assistant's own adapter, or with the target's active one."""
        layer = confu_layer(target)
        name = self.adapter_name(target) or layer.current
        return Contemplator(target, layer, name, self.config.future_layer_ids, self.contemplate_length)

    @property
    def contemplate_length(self) -> int:
        """Contemplate tokens in a row behind a node."""
        return self.config.contemplate_length

    def replay(self, options: TreeOptions) -> TreeReplay:
        """Counts the accepted tokens of texts that are known, with trees of `options` on the attached target.

        The network alone drafts, the same tree in every round: what is counted is what training changes.
        """
        target, options = self.target, replace(options, lookup=False)
        contemplates = self.config.contemplate and options.contemplate
        contemplator = self.contemplator(target) if contemplates else None
        return TreeReplay(lambda: self.new_drafter(target, options), contemplator, options)

    def adapter_name(self, target: PreTrainedModel) -> str | None:
        """Name of this assistant's own adapter on a target; None where the target's active adapter serves."""
        if self.target is not target or not self._attachment.owned:
            return None
        return self._attachment.adapter_name if self._attachment.loose_adapter() is not None else None

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the draft, its generation config, and the adapter in `adapter/`: the layout of a Hub repository.

        The config remembers the target that the draft is attached to, and the vocabulary of `tokenizer`.

        Args:
            save_directory: the folder; made if it is not there.
            is_main_process: False writes nothing but what every process must.
            push_to_hub: upload the folder as well; `repo_id` and the like go into `kwargs`.
            tokenizer: the target's.
            **kwargs: of `PreTrainedModel.save_pretrained`.
        """
        push_arguments = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs} if push_to_hub else {}
        remember_target(self.config, self.target, tokenizer)
        write_pair(save_directory, self, self._loose_adapter(), is_main_process=is_main_process, **kwargs)
        if push_to_hub and is_main_process:
            publish(save_directory, push_arguments.pop("repo_id", Path(save_directory).name), **push_arguments)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload draft, adapter, generation config and, where there is none, a card, in one commit.

        Args:
            repo_id: `owner/name`; made if it is not there.
            tokenizer: as in [`save_pretrained`].
            max_shard_size: as in `PreTrainedModel.save_pretrained`, bytes or `"5GB"`.
            **kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `tags`.
        """
        sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=tokenizer, **sizes)
            return publish(folder, repo_id, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """An assistant cannot write by itself; Transformers calls this when the target was never attached."""
        raise refusal(
            "No ConFu adapter is attached to the target",
            got="a target that does not know its assistant",
            expected="an attached one",
            fix="Call ConFuAssistant.from_pretrained(path, target=model) or confu.attach(model).",
        )

    def _loose_adapter(self) -> LooseAdapter | None:
        return self._adapter if self._attachment is None else self._attachment.loose_adapter()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are detached: they carry the adapter, not the target."""
        state = self.__dict__.copy()
        state["_adapter"], state["_attachment"] = self._loose_adapter(), None
        state["products"] = None
        return state
