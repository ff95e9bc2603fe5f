"""plot_custom_operators.py: the same lines, with a kernel in C++."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from pages import names_of
from torch.func import grad, vmap

NAME = "basics/plot_custom_operators"
SOURCE = """
#include <torch/library.h>
#include <ATen/ATen.h>
static int64_t calls = 0;
at::Tensor scan(const at::Tensor& a, const at::Tensor& x) {
  calls++;
  at::Tensor y = x.contiguous().clone(), decay = a.contiguous();
  int64_t n = y.size(-1);
  double *p = y.data_ptr<double>(), *q = decay.data_ptr<double>();
  for (int64_t row = 0; row < y.numel(); row += n)
    for (int64_t t = row + 1; t < row + n; t++) p[t] += q[t] * p[t - 1];
  return y;
}
TORCH_LIBRARY(proofs_cpp, m) {
  m.def("scan(Tensor a, Tensor x) -> Tensor");
  m.def("count() -> int", []() { return calls; });
}
TORCH_LIBRARY_IMPL(proofs_cpp, CPU, m) { m.impl("scan", &scan); }
"""


@pytest.fixture(scope="module")
def op(tmp_path_factory):
    folder, torch_folder = tmp_path_factory.mktemp("cpp"), Path(torch.__file__).parent
    (folder / "scan.cpp").write_text(SOURCE)
    include = torch_folder / "include"
    folders = include, include / "torch/csrc/api/include", sysconfig.get_path("include")
    command = ["g++", "-std=c++20", "-w", "-fPIC", "-shared", folder / "scan.cpp"]
    command += [f"-isystem{place}" for place in folders]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", folder / "scan.so"], check=True)
    torch.ops.load_library(folder / "scan.so")
    return torch.ops.proofs_cpp.scan.default


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_rules_for_an_operator_of_cpp(op):
    page = names_of(NAME, "members_first", "gradients", "Scan", "ScanOp", "plain_scan")
    page |= {"kernel": op, "scan": op}
    a, x = torch.rand(5, 8).double(), torch.randn(5, 8).double()
    leaves = a.clone().requires_grad_(), x.clone().requires_grad_()
    loop = torch.stack(
        [page["plain_scan"](*rows) for rows in zip(*leaves, strict=True)]
    )
    slopes = torch.autograd.grad(loop.sin().sum(), leaves)

    def check(calls, found, expected):
        nonlocal before
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        before, now = torch.ops.proofs_cpp.count(), before
        assert before - now == calls

    before = torch.ops.proofs_cpp.count()
    check(5, vmap(op)(a, x), loop)

    def rule(info, in_dims, *tensors):
        return op(*page["members_first"](info, in_dims, *tensors)), 0

    torch.library.register_vmap("proofs_cpp::scan", rule)
    check(1, vmap(op, (0, 1))(a, x.T), loop)
    for form in page["Scan"], page["ScanOp"]:

        def loss(a, x, form=form):
            return form.apply(a, x).sin().sum()

        check(1, vmap(form.apply)(a, x), loop)
        check(2, vmap(grad(loss, (0, 1)))(a, x), slopes)
        losses = vmap(loss)(*leaves)
        check(2, torch.autograd.grad(losses.sum(), leaves), slopes)
