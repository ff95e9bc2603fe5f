"""Who this machine is: device, driver, processor, versions, date."""

import datetime
import functools
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch


@functools.cache
def cpu_model():
    """Name of the processor, as the system gives it."""
    if platform.system() == "Darwin":
        name = output_of("sysctl", "-n", "machdep.cpu.brand_string")
        return name or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def cpu_cores():
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def output_of(*command):
    """First line that a command prints, or None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


@functools.cache
def nvidia_driver():
    """Version of the NVIDIA driver, or None where nvidia-smi does not tell."""
    return output_of(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )


def this_machine():
    """Describe the machine that runs this code; the fields are recording_files.MACHINE.

    ``accelerator``, ``memory`` (GiB), ``driver`` and ``cuda`` are None without one.
    """
    accelerator = memory = driver = None
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        accelerator = device.type
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            accelerator = properties.name
            memory = round(properties.total_memory / 2**30)
            driver = nvidia_driver()
    return {
        "accelerator": accelerator,
        "memory": memory,
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "driver": driver,
        "cuda": torch.version.cuda if accelerator else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def short_name(machine):
    """What a tab says: the accelerator, or the processor and its cores."""
    return machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"


def slug(machine):
    """Folder name of a machine: nvidia-h100-80gb-hbm3, intel-xeon-2-cores."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*ghz", " ", short_name(machine).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(machine):
    """One line that says on what a page ran, and when."""
    device = f"{machine['cpu']}, {machine['cores']} cores"
    if machine["accelerator"]:
        details = [machine["accelerator"]]
        if machine["memory"]:
            details.append(f"{machine['memory']} GiB")
        if machine["driver"]:
            details.append(f"driver {machine['driver']}")
        device = f"{', '.join(details)} in {device}"
    else:
        device += ", no accelerator"
    versions = f"torch {machine['torch']}, Python {machine['python']}"
    return f"{device}; {versions}; {machine['date']}"
