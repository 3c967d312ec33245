# SPDX-License-Identifier: MIT
"""The README's lines for many machines, run by the engines that clusters have: GNU parallel, and a Slurm of its own.

The Slurm is Debian's (slurm-wlm and munge): munged, slurmctld and one slurmd on the loopback interface, all
their files in a temporary folder; it needs root, and says so where it cannot start. Every test must end in the
file of a single run, byte for byte."""

import os
import shutil
import socket
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402
from test_readme import blocks, readme  # noqa: E402

SLURM = """ClusterName=actpatch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
"""


def lines_with(word):
    """The README's only ```sh block that has the word in it."""
    found = [block for block in blocks(readme()) if block.language == "sh" and any(word in line for line in block.lines)]
    if len(found) != 1:
        raise AssertionError("README.md: %d blocks with %r" % (len(found), word))
    return "\n".join(found[0].lines) + "\n"


def free_ports(n):
    """n ports of the loopback interface that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    """A cluster of one machine. `failure` says why there is none; the daemons run until stop()."""

    def __init__(self, folder):
        self.folder, self.daemons, self.failure = folder, [], None
        self.environment = {"SLURM_CONF": os.path.join(folder, "slurm.conf"), "PATH": os.environ["PATH"]}
        for name in ("state", "spool"):
            os.mkdir(os.path.join(folder, name))
        with open(os.path.join(folder, "munge.key"), "wb") as file:
            os.fchmod(file.fileno(), 0o400)
            file.write(os.urandom(128))
        with open(self.environment["SLURM_CONF"], "w") as file:
            file.write(SLURM.format(folder=folder, host=socket.gethostname().split(".")[0], ports=free_ports(2),
                                    cores=len(os.sched_getaffinity(0))))
        at = "--%s=" + folder + "/munge.%s"
        self.start("munged", "--foreground", "--force", *(at % pair for pair in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))))
        self.until("munged", lambda: os.path.exists(os.path.join(folder, "munge.socket")))
        self.start("slurmctld", "-D", "-i")
        self.until("slurmctld", lambda: b"UP" in self.ask("scontrol", "ping"))
        self.start("slurmd", "-D", "-N", socket.gethostname().split(".")[0])
        self.until("slurmd", lambda: b"idle" in self.ask("sinfo", "-h", "-o", "%T"))

    def start(self, name, *words):
        if self.failure is None:
            log = open(os.path.join(self.folder, name + ".log"), "wb")
            self.daemons.append(subprocess.Popen([name] + list(words), env=self.environment, stdin=subprocess.DEVNULL,
                                                 stdout=log, stderr=log, cwd=self.folder))
            log.close()

    def ask(self, *words):
        return subprocess.run(words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=60).stdout

    def until(self, name, ready):
        """Wait for a daemon; if it dies, or is not ready after half a minute, its last line is the failure."""
        end = time.time() + 30
        while self.failure is None and not ready():
            if time.time() > end or self.daemons[-1].poll() is not None:
                with open(os.path.join(self.folder, name + ".log"), errors="replace") as file:
                    self.failure = "%s does not start: %s" % (name, (file.read().strip().split("\n") or [""])[-1])
            time.sleep(0.1)

    def stop(self):
        for daemon in self.daemons[::-1]:
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


class Cluster(unittest.TestCase):
    def setUp(self):
        folder = util.scratch()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        os.symlink(util.TESTS, os.path.join(self.folder, "tests"))
        os.symlink(util.binary(), os.path.join(self.folder, "actpatch"))

    def ends_in_the_single_run(self, script, environment):
        """The README's lines make whole.npy out of at least four parts, and it is the single run's file."""
        done = util.run(["sh", "-e", "-c", script], cwd=self.folder, env=dict(
            environment, ACTPATCH_MODEL=util.TINY_MODEL), timeout=180)
        said = done.stdout + done.stderr
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("slurm-"):
                with open(os.path.join(self.folder, name)) as file:
                    said += "\n%s: %s" % (name, file.read())
        self.assertEqual(done.returncode, 0, said)
        self.assertGreaterEqual(sum(name.endswith(".part") for name in os.listdir(self.folder)), 4)
        util.must("patch", os.path.join(util.TINY, "ioi.tsv"), "--sweep", "block_every", "-o", "single.npy", cwd=self.folder)
        files = []
        for name in ("whole.npy", "single.npy"):
            with open(os.path.join(self.folder, name), "rb") as file:
                files.append(file.read())
        self.assertEqual(*files)

    def test_gnu_parallel(self):
        """The README's GNU parallel line and merge give the single run's file."""
        version = subprocess.run(["parallel", "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout \
            if shutil.which("parallel") else b""
        if not version.startswith(b"GNU parallel"):
            self.skipTest("GNU parallel is not installed (apt-get install parallel)")
        self.ends_in_the_single_run(lines_with("parallel "), {})

    def test_slurm(self):
        """The README's array script, submitted to a Slurm on this machine, and merge give the single run's file."""
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
        if missing:
            self.skipTest("%s not installed (apt-get install slurm-wlm munge)" % ", ".join(missing))
        if os.geteuid() != 0:
            self.skipTest("Slurm's daemons start jobs as other users and need root")
        with util.scratch() as state:
            os.chmod(state, 0o711)  # munged wants its socket within reach of all users
            slurm = Slurm(state)
            try:
                if slurm.failure:
                    self.skipTest(slurm.failure)
                script = lines_with("#SBATCH")
                with open(os.path.join(self.folder, script.split()[2].rstrip(":")), "w") as file:
                    file.write(script)
                self.ends_in_the_single_run(lines_with("sbatch "), slurm.environment)
            finally:
                slurm.stop()


if __name__ == "__main__":
    unittest.main()
