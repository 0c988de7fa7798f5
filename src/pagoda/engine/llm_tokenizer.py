"""A model's tokenizer as programs for vLLM and Hugging Face use it: their names for what `text.tokenizer` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.errors import ModelError
from pagoda.text.chat import ChatTemplate
from pagoda.text.tokenizer import Tokenizer


class LLMTokenizer:
    """What `LLM.get_tokenizer()` gives. `decode` shows special tokens unless told not to, as Hugging Face's does."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._template = tokenizer, template
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = next(iter((*tokenizer.eos_token_ids, *eos_token_ids)), None)
        self.bos_token = self._text(self.bos_token_id)
        self.eos_token = self._text(self.eos_token_id)
        self.vocab_size = tokenizer.vocab_size
        self.all_special_ids = sorted(tokenizer.special_ids)
        self.chat_template = None if template is None else template.source

    def _text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self._tokenizer.token_text(token_id)

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[int] | list[list[int]]]:
        """`input_ids` of one text, or of each."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}
        return {"input_ids": [self.encode(each, add_special_tokens=add_special_tokens) for each in text]}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def tokenize(self, text: str) -> list[str]:
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=False))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.token_piece(i) for i in ids]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str | list[int]:
        """The prompt of a conversation, as token ids or as text; what else is given are variables of the template."""
        if self._template is None:
            raise ModelError("this model has no chat template", remedy="Give one with LLM(chat_template=...)")
        ids = self._template.encode(
            self._tokenizer,
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return ids if tokenize else self.decode(ids)
