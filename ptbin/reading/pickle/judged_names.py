"""Which names in a pickle are known to be good, which can only be meant to do harm.

The table of good names decides what may be *understood*; the table of bad ones only decides what is
*refused by default*, so a name missing from it costs a refusal, never an execution.

Sources: the allow list of torch/_weights_only_unpickler.py; bypass lists in the advisories of
picklescan and modelscan; CPython's own module index for what reaches the system.
"""

from __future__ import annotations

import re
import sys
from typing import Literal

from ptbin.values.dtypes import BY_NAME, BY_STORAGE_CLASS, QUANTIZER_SCHEMES

Verdict = Literal["safe", "unknown", "unsafe"]

# Python 2 names of builtins modules (CPython, Lib/_compat_pickle.py)
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "exceptions": "builtins",
    "commands": "subprocess",
}

_TENSOR_CLASSES = frozenset(name.removesuffix("Storage") + "Tensor" for name in BY_STORAGE_CLASS)

_SAFE_NAMES: dict[str, frozenset[str]] = {
    "torch": frozenset(
        [*BY_NAME, *BY_STORAGE_CLASS, *_TENSOR_CLASSES, *QUANTIZER_SCHEMES, "Size", "Tensor", "device"]
    ),
    "torch.cuda": frozenset([*BY_STORAGE_CLASS, *_TENSOR_CLASSES]),
} | {
    module: frozenset(names.split())
    for module, names in {
        "builtins": (
            "bool bytearray bytes complex dict float frozenset int list long object range set slice str "
            "tuple unicode"
        ),
        "collections": "Counter OrderedDict defaultdict deque",
        "copyreg": "__newobj__ _reconstructor",
        "_codecs": "encode",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "uuid": "UUID",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "torch.autograd.variable": "Variable",
        "torch.storage": "TypedStorage UntypedStorage _TypedStorage _UntypedStorage _load_from_bytes",
        "torch.serialization": "_get_layout",
        "torch.layout": "torch.sparse_coo torch.sparse_csr torch.strided",
        # What says where the piece of a distributed tensor lies; records without behaviour.
        "torch.distributed.tensor": "DTensor",
        "torch.distributed.tensor._api": "DTensor",
        "torch.distributed._tensor.api": "DTensor",
        "torch.distributed.tensor._dtensor_spec": "DTensorSpec ShardOrderEntry TensorMeta",
        "torch.distributed._tensor.placement_types": (
            "DTensorSpec Partial Replicate Shard TensorMeta _Partial _StridedShard"
        ),
        "torch.distributed._tensor._dtensor_spec": "DTensorSpec TensorMeta",
        "torch.distributed.tensor.placement_types": "Partial Replicate Shard _Partial _StridedShard",
        "torch.distributed.device_mesh": "DeviceMesh",
        "torch.distributed._mesh_layout": "_FlatLayout _MeshLayout",
        "torch.distributed._shard.sharded_tensor.api": "ShardedTensor",
        "torch.distributed._shard.sharded_tensor.shard": "Shard",
        "torch.distributed._shard.metadata": "ShardMetadata",
        "torch.distributed._shard.sharding_spec.chunk_sharding_spec": "ChunkShardingSpec",
        "torch.distributed._shard.sharding_spec.api": "EnumerableShardingSpec",
        "torch.distributed.remote_device": "_remote_device",
        # What `.metadata` of torch.distributed.checkpoint consists of; records without behaviour.
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
            "TensorStorageMetadata _MEM_FORMAT_ENCODING"
        ),
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        # Plans that Megatron-LM keeps in it, and what it keeps next to the model; records without behaviour.
        "torch.distributed.checkpoint.planner": (
            "BytesWriteData SavePlan TensorWriteData WriteItem WriteItemType"
        ),
        "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
        "megatron.core.enums": "ModelType",
        "megatron.core.rerun_state_machine": "RerunDiagnostic RerunMode RerunState",
        "megatron.core.transformer.enums": (
            "AttnBackend AttnMaskType AttnType CudaGraphScope LayerType ModelType"
        ),
        "torch.distributed._shard.sharded_tensor.metadata": (
            "MEM_FORMAT_ENCODING ShardedTensorMetadata TensorProperties"
        ),
        "torch.nn.parameter": "Buffer Parameter UninitializedBuffer UninitializedParameter",
        "torch._tensor": "_rebuild_from_type _rebuild_from_type_v2",
        "torch.tensor": "_rebuild_from_type _rebuild_from_type_v2",
        "torch.nn.backends.thnn": "_get_thnn_function_backend",
        "torch._utils": (
            "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
            "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter "
            "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_csr_tensor "
            "_rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 "
            "_rebuild_wrapper_subclass _rebuild_xla_tensor"
        ),
    }.items()
}

# A class under these packages, in CamelCase, is a layer or an optimizer of torch's own.
_SAFE_CLASS_PACKAGES = (
    "torch.nn.modules.",
    "torch.optim.",
    "torch.nn.quantized.",
    "torch.ao.nn.",
    "torch.nn.qat.",
)

_UNSAFE_BUILTINS = frozenset(
    "eval exec execfile compile open file input raw_input __import__ breakpoint globals locals vars apply "
    "setattr delattr help exit quit reload".split()
)

# Top-level modules whose every function is one way or another to run code or reach the system.
_UNSAFE_MODULES = frozenset(
    """
    os posix nt ntpath posixpath sys subprocess _posixsubprocess pty shutil socket _socket socketserver
    ssl signal ctypes _ctypes cffi mmap fcntl resource select selectors asyncio multiprocessing
    concurrent threading importlib imp runpy pkgutil zipimport zipapp site sitecustomize usercustomize
    sysconfig code codeop pdb bdb cProfile profile trace timeit doctest unittest pydoc pydoc_data
    webbrowser antigravity idlelib lib2to3 turtledemo pip ensurepip venv setuptools distutils
    pkg_resources wheel urllib urllib2 urllib3 requests http httplib httpx aiohttp ftplib smtplib
    telnetlib imaplib poplib nntplib xmlrpc paramiko fabric pexpect psutil sh plumbum invoke tempfile
    fileinput glob io _io _pyio shelve dbm sqlite3 pickle _pickle cPickle jsonpickle marshal linecache
    inspect gc faulthandler tracemalloc platform getpass crypt pwd grp spwd readline rlcompleter
    py_compile compileall symtable dis ast tokenize cgitb cgi wsgiref _osx_support _aix_support _pyrepl
    winreg _winreg msilib nis syslog ossaudiodev tkinter turtle IPython ipykernel nbformat jupyter
    _thread thread dummy_threading atexit _winapi _interpreters _xxsubinterpreters _xxinterpchannels
    _testcapi _imp _frozen_importlib _frozen_importlib_external mailcap pipes zipfile tarfile gzip bz2
    lzma wave asyncore asynchat smtpd uu BaseHTTPServer SocketServer SimpleHTTPServer xmlrpclib httplib2
    numexpr sympy fire jinja2 mako pyximport cython cffi_backend _cffi_backend pywin win32api win32com
    nose pytest
    """.split()
)

# Of these only the module itself is judged: other packages have these names, too.
_COMMON_NAMES = frozenset(
    "code profile trace select sh invoke fabric platform inspect signal dis site test".split()
)

_UNSAFE_PATHS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_operator": "attrgetter call itemgetter methodcaller",
        "builtins": "reduce",
        "cloudpickle": "cloudpickle.loads cloudpickle.subprocess load loads",
        "codecs": "open",
        "copyreg": "extension",
        "dataclasses": "_create_fn",
        "dill": "_dill._eval_repr _dill._import_module _dill.loads load loads",
        "functools": "reduce",
        "hydra": "utils",
        "itertools": "starmap",
        "joblib": "load numpy_pickle",
        "keras": "models.load_model",
        "logging": "FileHandler config handlers",
        "numpy": (
            "DataSource _core.multiarray.fromfile core.multiarray.fromfile core.records ctypeslib distutils "
            "f2py fromfile genfromtxt lib._npyio_impl lib.npyio load loadtxt memmap rec save savetxt testing"
        ),
        "operator": "attrgetter call itemgetter methodcaller",
        "pandas": "eval io read_pickle",
        "test": "support",
        "torch": (
            "_C.PyTorchFileReader _C.PyTorchFileWriter _C._distributed _C._jit _C._load _C.import "
            "_dynamo.guards _dynamo.utils _inductor _ops classes cuda._dynamic distributed.elastic "
            "distributed.launcher distributed.rpc distributed.run export.load "
            "fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression "
            "fx.graph_module._exec_with_source fx.graph_module._forward_from_src hub jit.load "
            "jit.unsupported_tensor_ops load multiprocessing ops package save serialization.load testing "
            "utils._config_module utils.bottleneck utils.collect_env utils.cpp_extension "
            "utils.data.datapipes.utils.decoder utils.model_zoo"
        ),
        "types": "CodeType FunctionType LambdaType MethodType ModuleType",
        "typing": "_eval_type get_type_hints",
        "uuid": "_get_command_stdout _popen",
        "weakref": "finalize",
        "yaml": "load unsafe_load",
    }.items()
    for name in names.split()
)
"""Functions, classes and whole modules by their path, in modules that are harmless otherwise."""

_UNSAFE_PARTS = frozenset(
    "__globals__ __builtins__ __import__ __subclasses__ __bases__ __mro__ __code__ __class__ __dict__ "
    "__getattribute__ __reduce__ __reduce_ex__ __loader__ __spec__ "
    # frames and code objects, by which a function leads to the globals around it (CPython, Lib/inspect.py)
    "f_globals f_builtins f_locals f_back f_code gi_frame gi_code cr_frame cr_code ag_frame ag_code tb_frame "
    "tb_next func_globals func_code".split()
)

# Types of builtins whose methods people pickle (`str.lower` in a configuration, say) and that reach nothing.
_PLAIN_TYPES = frozenset(
    "dict list tuple set frozenset int long float complex bool str unicode bytes bytearray".split()
)

# Members of such modules that whole pickled modules do hold, and that only name a constant or a path rule.
_HARMLESS = {
    "inspect": frozenset(["_empty", "Parameter", "Signature", "_ParameterKind"]),
    "signal": frozenset(["Signals", "Handlers"]),
    "posixpath": frozenset(["join", "basename", "dirname", "splitext"]),
    "io": frozenset(["BytesIO", "StringIO"]),
    "_io": frozenset(["BytesIO", "StringIO"]),
}


_END_OF_STEP = re.compile(r"[.:]|$")


def _names_unsafe_path(path: str) -> bool:
    """Whether a path is one of the unsafe ones, or leads to something inside one."""
    return any(path[: end.start()] in _UNSAFE_PATHS for end in _END_OF_STEP.finditer(path))


def judge_global(module: str, name: str) -> Verdict:
    """The verdict on one global."""
    normal = plain_module(module)
    if name in _SAFE_NAMES.get(normal, ()):
        return "safe"
    if normal == "builtins":
        if name in ("getattr", "hasattr", "type", "super", "property", "print", "map", "filter", "zip"):
            return "unknown"  # judged by their arguments, see `_judge_call`
        return "unsafe" if name in _UNSAFE_BUILTINS or "." in name else "unknown"
    path = f"{normal}.{name}"
    if path in ("io.BytesIO", "_io.BytesIO", "io.StringIO", "_io.StringIO"):
        return "unknown"  # buffers in memory; some layers keep their extra state in one
    first, _, inside = normal.partition(".")
    if first in _COMMON_NAMES:
        if not inside and name not in _HARMLESS.get(first, ()):
            return "unsafe"
    elif first in _UNSAFE_MODULES and name not in _HARMLESS.get(normal, ()):
        return "unsafe"
    if _names_unsafe_path(path):
        return "unsafe"
    # Protocol 4 lets a name walk attributes ("nn.modules.os.system"): every step counts.
    steps = name.split(".")
    if any(step in _UNSAFE_PARTS for step in [*normal.split("."), *steps]):
        return "unsafe"
    if steps[-1] in ("system", "popen") or (
        len(steps) > 1 and any(step in _UNSAFE_MODULES for step in steps)
    ):
        return "unsafe"
    if len(steps) > 1 and any(_names_unsafe_path(".".join(steps[start:])) for start in range(len(steps) - 1)):
        return "unsafe"
    if module.startswith("__torch__"):
        return "safe"  # TorchScript's own namespace, resolved inside the archive and never imported
    if path.startswith(_SAFE_CLASS_PACKAGES) and name[:1].isupper() and "." not in name:
        return "safe"
    return "unknown"


# Bound methods with such names are met as default factories and lookups (`vocabulary.__getitem__`). They are
# harmless to hold; a pickle that calls one itself is after something else.
_HELD_METHODS = frozenset("__getitem__ __len__ __next__ __contains__ __iter__ __call__".split())


def plain_module(module: str) -> str:
    """The module under the name that Python 3 has for it."""
    top, _, rest = module.partition(".")
    return _RENAMED.get(top, top) + (f".{rest}" if rest else "")


def is_special_attribute(name: str) -> bool:
    """Whether no pickler asks for an attribute of this name."""
    return (
        not name.isidentifier()
        or (name.startswith("__") and name not in _HELD_METHODS)
        or name in ("system", "popen")
        or name in _UNSAFE_PARTS
    )


def judge_attribute(module: str, steps: list[str]) -> Verdict:
    """The verdict on an attribute of a global, by its whole path.

    Every step on the way counts by its name: a module that another one imports (`mymodel.subprocess`, or
    `random._os`) is a global like any other until something is taken from it.
    """
    if plain_module(module) == "builtins":
        return "unknown" if len(steps) == 2 and steps[0] in _PLAIN_TYPES else "unsafe"
    *way, last = steps
    if any(step.lstrip("_") in _UNSAFE_MODULES or step.startswith("__") for step in way):
        return "unsafe"
    # A class has methods (`Net.compile`) and members (`Scheme.http`) of names that are dangerous in a module
    # (`io.open`). By its place a class and a module look alike; by their names classes do not (PEP 8).
    if way[-1].lstrip("_")[:1].isupper() or last in _COMMON_NAMES:
        if _names_unsafe_path(f"{module}.{'.'.join(steps)}"):
            return "unsafe"
        return judge_global(module, ".".join(way))
    if last in _UNSAFE_BUILTINS:
        return "unsafe"
    return judge_global(module, ".".join(steps))


def judge_method_call(module: str, steps: list[str]) -> Verdict:
    """The verdict on calling an attribute of a class: a nested class, a method.

    A model's own classes may rebuild themselves so, as they may by any function. Of the standard library and
    of classes whose meaning ptbin knows no pickler calls methods: `pathlib.Path.write_text` does harm.
    """
    if steps[-1].startswith("__"):
        return "unsafe"
    if steps[-1].lstrip("_")[:1].isupper():
        return "unknown"
    known = judge_global(module, steps[0]) == "safe" and not module.startswith("__torch__")
    if known or plain_module(module).partition(".")[0] in sys.stdlib_module_names:
        return "unsafe"
    return "unknown"
