"""An orchestrator's view of ramferry: everything here comes from the public API.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python orchestrator.py --agent HOST:PORT --to HOST:PORT \
        --source-qmp /run/vm1.qmp --destination-qmp /run/vm1.qmp

Lists, creates and watches one migration, and prints one JSON line with what it
saw. Exits 0 when the migration SUCCEEDED, 1 when it ended otherwise, and 2 when
an agent refused a call or could not be reached.
"""

import argparse
import importlib
import json
import pathlib
import sys
import tempfile
import uuid
from contextlib import contextmanager

import grpc
import grpc_tools
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc

PROTOS = pathlib.Path(__file__).resolve().parents[4] / "proto" / "proto"
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
CALL_SECONDS = 60


@contextmanager
def stubs(protos):
    """The messages and clients generated from the .proto files, in a directory that goes away."""
    with tempfile.TemporaryDirectory() as directory:
        files = [str(path.relative_to(protos)) for path in pathlib.Path(protos).rglob("*.proto")]
        well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
        arguments = [f"-I{protos}", f"-I{well_known}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
        if protoc.main(["protoc", *arguments, *files]) != 0:
            raise SystemExit(f"the .proto files in {protos} do not compile")
        sys.path.insert(0, directory)
        try:
            messages = importlib.import_module("ramferry.v1.migration_pb2")
            services = importlib.import_module("ramferry.v1.migration_pb2_grpc")
            yield messages, services
        finally:
            sys.path.remove(directory)


def migrate(arguments, messages, services):
    """One migration from its creation to its end: what an orchestrator sees of it."""
    with grpc.insecure_channel(arguments.agent) as channel:
        discovered = sorted(ProtoReflectionDescriptorDatabase(channel).get_services())
        if "ramferry.v1.MigrationService" not in discovered:
            raise SystemExit(f"{arguments.agent} serves no migrations, but {discovered}")
        migrations = services.MigrationServiceStub(channel)
        before = migrations.ListMigrations(messages.ListMigrationsRequest(), timeout=CALL_SECONDS).migrations

        # With an id and a request id of our own the call may be repeated when its answer is lost.
        request = messages.CreateMigrationRequest(
            id=arguments.id,
            request_id=str(uuid.uuid4()),
            spec=messages.MigrationSpec(
                source_qmp_path=arguments.source_qmp,
                destination_qmp_path=arguments.destination_qmp,
                destination_agent=arguments.to,
            ),
        )
        migrations.CreateMigration(request, timeout=CALL_SECONDS)

        # The first update is the migration as it is; then one at each change of state and at intervals.
        states, updates, migration = [], 0, None
        for update in migrations.WatchMigration(
            messages.WatchMigrationRequest(id=arguments.id), timeout=arguments.timeout
        ):
            migration, updates = update.migration, updates + 1
            state = messages.MigrationState.Name(migration.state).removeprefix("MIGRATION_STATE_")
            if state not in states[-1:]:
                states.append(state)
            if state in ENDED:
                break

    progress = migration.progress if migration else messages.MigrationProgress()
    return {
        "services": discovered,
        "migrations_before": [known.id for known in before],
        "id": arguments.id,
        "states": states,
        "updates": updates,
        "state": states[-1] if states else None,
        "rounds": len(progress.rounds),
        "transferred_bytes": progress.transferred_bytes,
        "downtime_seconds": progress.downtime.ToNanoseconds() / 1e9 if progress.HasField("downtime") else None,
        "error": migration.error.reason if migration and migration.HasField("error") else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", required=True, metavar="HOST:PORT", help="the source host's agent")
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="the destination host's agent")
    parser.add_argument("--source-qmp", required=True, metavar="PATH")
    parser.add_argument("--destination-qmp", required=True, metavar="PATH")
    parser.add_argument("--id", default=f"orchestrator-{uuid.uuid4().hex[:8]}")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="longest watch")
    parser.add_argument("--protos", type=pathlib.Path, default=PROTOS, metavar="DIR")
    arguments = parser.parse_args()
    try:
        with stubs(arguments.protos) as (messages, services):
            seen = migrate(arguments, messages, services)
    except grpc.RpcError as refused:
        print(json.dumps({"error": {"code": refused.code().name, "message": refused.details()}}))
        return 2
    print(json.dumps(seen))
    return 0 if seen["state"] == "SUCCEEDED" else 1


if __name__ == "__main__":
    sys.exit(main())
