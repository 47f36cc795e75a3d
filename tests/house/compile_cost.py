#!/usr/bin/env python3
"""What including the umbrella costs a compiler over Eigen's own headers, in seconds of CPU time.

usage: compile_cost.py INCLUDE_DIR EIGEN_INCLUDE_DIR COMPILER LIMIT_SECONDS

Eigen's own: <Eigen/Core> and <unsupported/Eigen/CXX11/Tensor>, which the umbrella's interface speaks. Both files are
compiled at -O2 three times, alternating; the smallest time of each counts, for noise only adds. Exit status 77: skipped.
"""
import os
import resource
import shutil
import subprocess
import sys
import tempfile

ROUNDS = 3


def cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    include, eigen, compiler, limit = sys.argv[1:5]
    if shutil.which(compiler) is None:
        print(f"SKIPPED: {compiler} is not installed")
        return 77
    sources = {
        "Eigen": "#include <Eigen/Core>\n#include <unsupported/Eigen/CXX11/Tensor>\n",
        "umbrella": "#include <Eigen/Core>\n#include <unsupported/Eigen/CXX11/Tensor>\n#include <nibble/nibble.hpp>\n",
    }
    times = {name: [] for name in sources}
    with tempfile.TemporaryDirectory() as work:
        for name, text in sources.items():
            with open(os.path.join(work, name + ".cpp"), "w", encoding="utf-8") as f:
                f.write(text)
        for _ in range(ROUNDS):
            for name in sources:
                times[name].append(cpu_seconds([compiler, "-std=c++17", "-O2", "-I", include, "-isystem", eigen, "-c",
                                                os.path.join(work, name + ".cpp"), "-o", os.path.join(work, "out.o")]))
    cost = min(times["umbrella"]) - min(times["Eigen"])
    print(f"{compiler}: Eigen's headers {min(times['Eigen']):.2f} s, with the umbrella {min(times['umbrella']):.2f} s, "
          f"cost {cost:.2f} s (limit {limit} s)")
    # An umbrella that costs nothing was not compiled.
    return 0 if 0.0 < cost < float(limit) else 1


sys.exit(main())
