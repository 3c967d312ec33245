#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes tests/convert/: small GPT-2 checkpoints as transformers, safetensors and torch save them.

    python3 tests/make_convert_fixtures.py        (needs torch, transformers, safetensors, numpy)

Each folder MODEL-FORM below tests/convert/ is one way of storing a model of 2 layers, 3 heads of 4,
n_inner 20, 8 positions and 280 tokens; folders of one MODEL hold the same weights. expected.json
says what the flat file must hold, as torch itself converts: for each MODEL the sizes and per tensor
its shape and the start of the SHA-256 of its bytes in the files of --dtype f32 and --dtype f16.
tokenizer/ holds one tokenizer in both of its forms; expected.json lists its tokens' bytes.
"""

import hashlib
import json
import os
import shutil
import tempfile

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'convert')
BASE = dict(n_layer=2, n_head=3, n_embd=12, n_inner=20, n_positions=8, vocab_size=280,
            bos_token_id=0, eos_token_id=0)
IGNORED = ('.attn.bias', '.attn.masked_bias')


def model_of(seed, **changes):
    """A model whose weights are all lively: no bias is zero and no LayerNorm weight is one."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**BASE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.5)
    return model.eval()


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:32]


def describe(config, state):
    """What the converter must make of `state`, by torch's own conversions."""
    tensors = {}
    for name, tensor in state.items():
        name = name[len('transformer.'):] if name.startswith('transformer.') else name
        if name.endswith(IGNORED) or (name == 'lm_head.weight' and config.tie_word_embeddings):
            continue
        # numpy rounds double to half once, as it should; torch goes through float and rounds twice
        half = torch.from_numpy(tensor.float().numpy() if tensor.dtype == torch.bfloat16 else
                                tensor.numpy())
        half = torch.from_numpy(half.numpy().astype('float16')) if half.dim() == 2 else half.float()
        tensors[name] = [list(tensor.shape), digest(tensor.float()), digest(half)]
    return {'n_layer': config.n_layer, 'n_head': config.n_head, 'd_model': config.n_embd,
            'd_mlp': config.n_inner or 4 * config.n_embd, 'n_ctx': config.n_positions,
            'd_vocab': config.vocab_size, 'epsilon': config.layer_norm_epsilon,
            'act_fn': {'gelu_new': 0, 'gelu': 1, 'relu': 2}[config.activation_function],
            'flags': int(config.scale_attn_by_inverse_layer_idx), 'tensors': tensors}


def folder(name, config=None):
    path = os.path.join(HERE, name)
    os.makedirs(path)
    if config is not None:
        config.save_pretrained(path)
    return path


def expect(expected, name, config, state):
    """All forms of one model must give the same file."""
    model = name.split('-')[0]
    assert expected.setdefault(model, describe(config, state)) == describe(config, state), name


def saved(expected, name, model, **options):
    """By save_pretrained."""
    path = folder(name)
    model.save_pretrained(path, **options)
    extra = os.path.join(path, 'generation_config.json')
    if os.path.exists(extra):
        os.remove(extra)
    expect(expected, name, model.config, model.state_dict())


def torch_saved(expected, name, config, state, **options):
    """By torch.save, as pytorch_model.bin."""
    torch.save(state, os.path.join(folder(name, config), 'pytorch_model.bin'), **options)
    expect(expected, name, config, state)


def as_version_2_wrote_it(state):
    """With the mask that old versions of transformers stored in every layer."""
    state = dict(state)
    mask = torch.tril(torch.ones(8, 8, dtype=torch.uint8)).view(1, 1, 8, 8)
    for layer in range(BASE['n_layer']):
        state['transformer.h.%d.attn.bias' % layer] = mask.clone()
        state['transformer.h.%d.attn.masked_bias' % layer] = torch.tensor(-1e4)
    return state


def strided(state):
    """The same values laid out otherwise: transposed, sliced from something wider, every 2nd."""
    def wider(tensor):
        room = torch.zeros(tensor.shape[0] + 2, tensor.shape[1] + 3)
        room[1:-1, 2:-1] = tensor
        return room[1:-1, 2:-1]

    def every_other(tensor):
        room = torch.zeros(2 * tensor.shape[0])
        room[::2] = tensor
        return room[::2]
    changed = {}
    for name, tensor in state.items():
        if name.endswith('c_attn.weight') or name.endswith('wte.weight'):
            tensor = tensor.t().contiguous().t()
        elif name.endswith('wpe.weight') or name.endswith('c_fc.weight'):
            tensor = wider(tensor)
        elif name.endswith('ln_1.bias'):
            tensor = every_other(tensor)
        changed[name] = tensor
    return changed


def make_models(expected):
    model = model_of(1)
    state, config = {k: v.detach() for k, v in model.state_dict().items()}, model.config
    saved(expected, 'base-safetensors', model)
    saved(expected, 'base-safetensors-shards', model, max_shard_size='10KB')
    saved(expected, 'base-bin', model, safe_serialization=False)
    saved(expected, 'base-bin-shards', model, safe_serialization=False, max_shard_size='10KB')
    torch_saved(expected, 'base-bin-legacy', config, as_version_2_wrote_it(state),
                _use_new_zipfile_serialization=False)
    bare = {k[len('transformer.'):]: v for k, v in state.items() if k != 'lm_head.weight'}
    save_file({k: v.clone() for k, v in bare.items()},
              os.path.join(folder('base-safetensors-bare', config), 'model.safetensors'))
    expect(expected, 'base-safetensors-bare', config, bare)
    torch_saved(expected, 'base-bin-strided', config, strided(bare))

    # the same values again, in the other float types
    saved(expected, 'f16-safetensors', model_of(1).half())
    saved(expected, 'bf16-safetensors', model_of(1).bfloat16())
    torch_saved(expected, 'f16-bin', config, {k: v.half() for k, v in bare.items()})
    torch_saved(expected, 'bf16-bin-legacy', config, {k: v.bfloat16() for k, v in bare.items()},
                _use_new_zipfile_serialization=False)
    model = model_of(2, n_layer=1).double()
    parameters = {k: torch.nn.Parameter(torch.randn(v.shape, dtype=v.dtype), requires_grad=False)
                  for k, v in model.transformer.state_dict().items()}
    torch_saved(expected, 'f64-bin-parameters', model.config, parameters)

    saved(expected, 'untied-safetensors', model_of(
        3, vocab_size=276, n_layer=1, n_inner=None, tie_word_embeddings=False,
        activation_function='relu', layer_norm_epsilon=3e-4, scale_attn_by_inverse_layer_idx=True))


def make_tokenizer(expected):
    """A tokenizer of 275 trained tokens and one added, in both forms."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(['the cat sat on the mat, été naïve the hat'] * 4, vocab_size=275,
                                special_tokens=['<|endoftext|>'])
    with tempfile.TemporaryDirectory() as scratch:
        trained.save_model(scratch)
        fast = GPT2TokenizerFast(os.path.join(scratch, 'vocab.json'),
                                 os.path.join(scratch, 'merges.txt'))
        fast.add_special_tokens({'additional_special_tokens': ['<|né w|>']})
        fast.save_pretrained(scratch)
        path = folder('tokenizer')
        for name in ('tokenizer.json', 'vocab.json', 'merges.txt', 'added_tokens.json'):
            shutil.copy(os.path.join(scratch, name), path)
        with open(os.path.join(scratch, 'tokenizer.json'), encoding='utf-8') as file:
            model = json.load(file)['model']
    letter = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = {number: bytes(letter[c] for c in token).hex()
              for token, number in model['vocab'].items()}
    tokens[fast.convert_tokens_to_ids('<|né w|>')] = '<|né w|>'.encode().hex()
    merges = [[model['vocab'][part] for part in (left, right, left + right)]
              for left, right in model['merges']]
    expected['tokenizer'] = {'tokens': [tokens[i] for i in range(len(tokens))], 'merges': merges,
                             'eot': fast.eos_token_id}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    expected = {}
    with torch.no_grad():
        make_models(expected)
    make_tokenizer(expected)
    with open(os.path.join(HERE, 'expected.json'), 'w') as file:
        file.write('{\n')
        file.write(',\n'.join('"%s": %s' % (name, json.dumps(value, separators=(',', ':')))
                              for name, value in expected.items()))
        file.write('\n}\n')


if __name__ == '__main__':
    main()
