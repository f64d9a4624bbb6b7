"""Runs SQL with a real Apache Flink on this machine: run.py HOME SLOTS.

Starts a JobManager, a TaskManager and a SQL gateway as separate processes on loopback ports, and says {} when they are ready.
Then reads requests from standard input, a JSON object a line: {"statements": [...], "interval": "10s"}; the last statement is
an INSERT. Answers each with a line: {"cpuSeconds": of the TaskManager, "wallSeconds", "checkpoints"}, or {"error"}.
Ends the processes at the end of its input.
"""
import atexit, json, os, pathlib, shutil, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request

HOME, SLOTS = pathlib.Path(sys.argv[1]).resolve(), int(sys.argv[2])
DIST, MORE = HOME / "pyflink", HOME / "more"
PATIENCE = 120
EXPORTS = "java.rmi/sun.rmi.registry java.security.jgss/sun.security.krb5 jdk.compiler/com.sun.tools.javac.api"
OPENS = ("java.base/java.lang java.base/java.net java.base/java.io java.base/java.nio java.base/sun.nio.ch "
         "java.base/java.lang.reflect java.base/java.text java.base/java.time java.base/java.util "
         "java.base/java.util.concurrent java.base/java.util.concurrent.atomic java.base/java.util.concurrent.locks")
MODULES = [f"--add-exports={m}=ALL-UNNAMED" for m in EXPORTS.split()] + [f"--add-opens={m}=ALL-UNNAMED" for m in OPENS.split()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


WORK = pathlib.Path(tempfile.mkdtemp(prefix="floodmark-flink-"))
REST, RPC, GATEWAY = free_port(), free_port(), free_port()
CHILDREN = []


def end():
    for child in reversed(CHILDREN):
        child.kill()
        child.wait()
    shutil.rmtree(WORK, ignore_errors=True)


def configure():
    (WORK / "conf").mkdir()
    (WORK / "tmp").mkdir()
    settings = {
        "jobmanager.bind-host": "127.0.0.1", "jobmanager.rpc.address": "127.0.0.1", "jobmanager.rpc.port": RPC,
        "jobmanager.memory.process.size": "1600m", "rest.address": "127.0.0.1", "rest.bind-address": "127.0.0.1",
        "rest.port": REST, "taskmanager.bind-host": "127.0.0.1", "taskmanager.host": "127.0.0.1",
        "taskmanager.numberOfTaskSlots": SLOTS, "taskmanager.memory.task.heap.size": "4g",
        "taskmanager.memory.managed.size": "512m", "taskmanager.memory.network.min": "256m",
        "taskmanager.memory.network.max": "256m", "parallelism.default": SLOTS, "pipeline.object-reuse": "true",
        "io.tmp.dirs": WORK / "tmp", "sql-gateway.endpoint.rest.address": "127.0.0.1",
        "sql-gateway.endpoint.rest.port": GATEWAY,
    }
    (WORK / "conf/config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    (WORK / "conf/log4j.properties").write_text(
        "rootLogger.level = WARN\nrootLogger.appenderRef.f.ref = F\nappender.f.name = F\nappender.f.type = File\n"
        "appender.f.fileName = ${sys:log.file}\nappender.f.layout.type = PatternLayout\n"
        "appender.f.layout.pattern = %d %-5p %c{1} - %m%n\n")


def environment():
    return os.environ | {"FLINK_CONF_DIR": str(WORK / "conf"), "FLINK_LIB_DIR": str(DIST / "lib"),
                         "FLINK_PLUGINS_DIR": str(DIST / "plugins"), "FLINK_OPT_DIR": str(DIST / "opt")}


def logging(name):
    return [f"-Dlog.file={WORK}/{name}.log", f"-Dlog4j.configurationFile=file:{WORK}/conf/log4j.properties"]


def parameters(command):
    """JVM options and dynamic properties, as Flink's own scripts work them out."""
    run = subprocess.run(
        ["java", *logging("parameters"), "-cp", f"{DIST}/bin/bash-java-utils.jar:{DIST}/lib/*",
         "org.apache.flink.runtime.util.bash.BashJavaUtils", command, "--configDir", str(WORK / "conf")],
        env=environment(), capture_output=True, text=True)
    mark = "BASH_JAVA_UTILS_EXEC_RESULT:"
    found = [line.split(mark, 1)[1].split() for line in run.stdout.splitlines() if mark in line]
    if len(found) != 2:
        raise RuntimeError(f"{command}: {run.stdout[-500:]}{run.stderr[-500:]}")
    return found


def launch(name, options, classes, main, arguments):
    out = open(WORK / f"{name}.out", "wb")
    command = ["java", *options, *MODULES, *logging(name), "-cp", classes, main, *arguments]
    child = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    CHILDREN.append(child)
    return child


def http(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read() or b"{}")
    except urllib.error.HTTPError as e:
        raise RuntimeError(f"{url}: {e.read().decode(errors='replace')[:2000]}") from e


JM, GW = f"http://127.0.0.1:{REST}", f"http://127.0.0.1:{GATEWAY}/v1"


def wait_for(what, ready):
    start = time.monotonic()
    while True:
        try:
            if ready():
                return
        except OSError:
            pass
        dead = [c for c in CHILDREN if c.poll() is not None]
        if dead or time.monotonic() - start > PATIENCE:
            logs = "".join(p.read_text(errors="replace")[-1500:] for p in WORK.glob("*.out"))
            raise RuntimeError(f"{what} is not ready: {logs}")
        time.sleep(0.1)


def start():
    configure()
    classes = f"{DIST}/lib/*:" + ":".join(str(p) for p in MORE.glob("flink-sql-connector-kafka-*.jar"))
    options, dynamic = parameters("GET_JM_RESOURCE_PARAMS")
    launch("jobmanager", options, classes, "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint",
           ["--configDir", str(WORK / "conf"), *dynamic])
    wait_for("the JobManager", lambda: http(JM + "/overview"))
    options, dynamic = parameters("GET_TM_RESOURCE_PARAMS")
    task_manager = launch("taskmanager", options, classes, "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
                          ["--configDir", str(WORK / "conf"), *dynamic])
    wait_for("the TaskManager", lambda: http(JM + "/overview")["taskmanagers"] > 0)
    gateway = ":".join(str(p) for p in [*MORE.glob("flink-sql-gateway-*.jar"), *DIST.glob("opt/flink-python-*.jar")])
    launch("gateway", ["-Xmx1g"], f"{classes}:{gateway}", "org.apache.flink.table.gateway.SqlGateway",
           [f"-Dsql-gateway.endpoint.rest.address=127.0.0.1", f"-Dsql-gateway.endpoint.rest.port={GATEWAY}"])
    wait_for("the SQL gateway", lambda: http(GW + "/info"))
    return task_manager


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def execute(session, statement):
    operation = http(f"{GW}/sessions/{session}/statements", {"statement": statement})["operationHandle"]
    while True:
        result = http(f"{GW}/sessions/{session}/operations/{operation}/result/0")
        if result.get("resultType") != "NOT_READY":
            return result
        time.sleep(0.02)


def run(task_manager, request):
    properties = {
        "execution.runtime-mode": "streaming", "parallelism.default": str(SLOTS), "table.local-time-zone": "UTC",
        "pipeline.object-reuse": "true", "state.backend.type": "hashmap",
        "execution.checkpointing.interval": request["interval"], "execution.checkpointing.mode": "EXACTLY_ONCE",
        "execution.checkpointing.dir": f"file://{WORK}/checkpoints",
    }
    session = http(GW + "/sessions", {"properties": properties})["sessionHandle"]
    before, begun = cpu_seconds(task_manager.pid), time.monotonic()
    *setup, insert = request["statements"]
    for statement in setup:
        execute(session, statement)
    result = execute(session, insert)
    try:
        job = result["results"]["data"][0]["fields"][0]
    except (KeyError, IndexError):
        raise RuntimeError(json.dumps(result)[:2000]) from None
    while (state := http(f"{JM}/jobs/{job}")["state"]) not in ("FINISHED", "FAILED", "CANCELED"):
        time.sleep(0.1)
    wall, cpu = time.monotonic() - begun, cpu_seconds(task_manager.pid) - before
    if state != "FINISHED":
        raise RuntimeError(f"{state}: {json.dumps(http(f'{JM}/jobs/{job}/exceptions'))[:2000]}")
    checkpoints = http(f"{JM}/jobs/{job}/checkpoints")["counts"]["completed"]
    http(f"{GW}/sessions/{session}", method="DELETE")
    return {"cpuSeconds": cpu, "wallSeconds": wall, "checkpoints": checkpoints}


def main():
    atexit.register(end)
    try:
        task_manager = start()
    except Exception as e:
        print(json.dumps({"error": str(e)}), flush=True)
        return
    print("{}", flush=True)
    for line in sys.stdin:
        try:
            answer = run(task_manager, json.loads(line))
        except Exception as e:
            answer = {"error": str(e)}
        print(json.dumps(answer), flush=True)


main()
