"""Safe, unknown, unsafe: by name and by construction."""

from __future__ import annotations

import cloudpickle
import pytest

from ptbin.reading.pickle_machine import run_pickle
from ptbin.reading.verdicts import judge_global, judge_programs

SAFE = """
collections.OrderedDict torch._utils._rebuild_tensor_v2 torch.FloatStorage torch.float8_e4m3fn
torch.Size numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar numpy.dtype
_codecs.encode __builtin__.set builtins.complex argparse.Namespace pathlib.PosixPath
torch.nn.modules.linear.Linear torch.nn.modules.batchnorm.BatchNorm2d torch.optim.adam.Adam
torch.storage._load_from_bytes __torch__.models.net.Net
torch.nn.backends.thnn._get_thnn_function_backend
""".split()

UNKNOWN = """
mymodel.Net models.yolo.Model omegaconf.dictconfig.DictConfig functools.partial
transformers.training_args.OptimizerNames trl.trainer.sft_config.SFTConfig
dill._dill._create_function cloudpickle.cloudpickle._make_function enum.Enum
torch_geometric.data.data.Data builtins.getattr _io.BytesIO
lightning.fabric.utilities.data.AttributeDict
""".split()

UNSAFE = """
os.system posix.system nt.system subprocess.Popen commands.getoutput builtins.eval __builtin__.exec
builtins.compile builtins.__import__ builtins.open __builtin__.apply sys.modules socket.socket
pip.main pip._internal.main pydoc.locate ctypes.CDLL runpy.run_path importlib.import_module
code.interact pty.spawn webbrowser.open shutil.rmtree logging.config.listen logging.FileHandler
operator.attrgetter operator.methodcaller _operator.attrgetter types.CodeType marshal.loads
pickle.loads _pickle.loads torch.hub.load torch.load torch.serialization.load
torch.utils.cpp_extension.load torch.distributed.rpc.rpc_sync numpy.testing._private.utils.runstring
numpy.f2py.crackfortran.getlincoef asyncio.unix_events._UnixSubprocessTransport._start profile.run
cProfile.run timeit.timeit trace.Trace bdb.Bdb.run pdb.run doctest.debug_script
idlelib.run.Executive lib2to3.pgen2.grammar ensurepip._run_pip venv.create uuid._get_command_stdout
_aix_support._read_cmd_output _osx_support._find_build_tool torch.nn.os.system
mypackage.thing.os.system dill.loads cloudpickle.loads joblib.load pandas.read_pickle requests.get
urllib.request.urlopen http.client.HTTPSConnection ftplib.FTP smtplib.SMTP tempfile.mkstemp
""".split()


def split(path: str) -> tuple[str, str]:
    module, _, name = path.rpartition(".")
    return module, name


@pytest.mark.parametrize("path", SAFE)
def test_known_good_names_are_safe(path: str) -> None:
    assert judge_global(*split(path)) == "safe"


@pytest.mark.parametrize("path", UNKNOWN)
def test_a_models_own_classes_are_unknown(path: str) -> None:
    assert judge_global(*split(path)) == "unknown"


@pytest.mark.parametrize("path", UNSAFE)
def test_names_that_reach_the_system_are_unsafe(path: str) -> None:
    assert judge_global(*split(path)) == "unsafe"


@pytest.mark.parametrize("name", ["os.system", "Module.__class__", "a.__globals__", "F.os.popen"])
def test_every_step_of_a_dotted_name_counts(name: str) -> None:
    assert judge_global("torch.nn", name) == "unsafe"


def verdict(stream: bytes) -> str:
    return judge_programs([run_pickle(stream, reducers={})]).verdict


def test_getattr_is_judged_by_what_it_asks_for() -> None:
    bound_method = b"\x80\x02cbuiltins\ngetattr\ncmymodel\nNet\nX\x07\x00\x00\x00forward\x86R."
    private = b"\x80\x02cbuiltins\ngetattr\ncmymodel\nNet\nX\x08\x00\x00\x00__dict__\x86R."
    assert verdict(bound_method) == "unknown"
    assert verdict(private) == "unsafe"


def test_calling_a_value_hides_the_name_that_is_called() -> None:
    assert verdict(b"\x80\x02cmymodel\nfactory\n)R)R.") == "unsafe"


SCRIPT = """
class OfAScript:
    def __init__(self, value):
        self.value = value

    def doubled(self):
        return self.value * 2
"""


def of_a_script() -> object:
    """An instance of a class that no module can be asked for, as those of notebooks."""
    names: dict[str, type] = {"__name__": "__main__"}  # type: ignore[dict-item]
    exec(SCRIPT, names)  # noqa: S102 - our own text
    return names["OfAScript"](3)


class CallsAFunction:
    def __reduce__(self) -> tuple[object, ...]:
        return (lambda: "run", ())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_class_that_cloudpickle_wrote_out_is_unknown(protocol: int) -> None:
    stream = cloudpickle.dumps(of_a_script(), protocol=protocol)
    assert b"_make_skeleton_class" in stream, "by value"
    report = judge_programs([run_pickle(stream, reducers={})])
    assert (report.verdict, report.findings) == ("unknown", ())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_function_that_the_pickle_itself_calls_is_unsafe(protocol: int) -> None:
    assert verdict(cloudpickle.dumps(CallsAFunction(), protocol=protocol)) == "unsafe"


def test_an_extension_code_hides_its_name() -> None:
    assert verdict(b"\x80\x02\x82\x01.") == "unsafe"


def test_nothing_named_nothing_to_fear() -> None:
    assert verdict(b"\x80\x02}.") == "safe"
