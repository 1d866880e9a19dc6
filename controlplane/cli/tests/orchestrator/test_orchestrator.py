"""orchestrator.py against a scripted agent in this process: python -m unittest"""

import json
import pathlib
import subprocess
import sys
import unittest
from concurrent import futures

import grpc
from grpc_reflection.v1alpha import reflection

import orchestrator

PROGRAM = pathlib.Path(orchestrator.__file__)


class Scripted:
    """Serves one list of states, or refuses to create."""

    def __init__(self, messages, services, states, refusal=None):
        self.messages, self.states, self.refusal, self.created = messages, states, refusal, None
        self.server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))

        class Service(services.MigrationServiceServicer):
            ListMigrations = lambda _, request, context: messages.ListMigrationsResponse()
            CreateMigration = lambda _, request, context: self.create(request, context)
            WatchMigration = lambda _, request, context: self.watch(request)

        services.add_MigrationServiceServicer_to_server(Service(), self.server)
        name = messages.DESCRIPTOR.services_by_name["MigrationService"].full_name
        reflection.enable_server_reflection([name, reflection.SERVICE_NAME], self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def create(self, request, context):
        self.created = request
        if self.refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        return self.messages.CreateMigrationResponse(migration=self.messages.Migration(id=request.id))

    def watch(self, request):
        for state in self.states:
            value = self.messages.MigrationState.Value(f"MIGRATION_STATE_{state}")
            yield self.messages.WatchMigrationResponse(migration=self.messages.Migration(id=request.id, state=value))


class OrchestratorTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stubs = orchestrator.stubs(orchestrator.PROTOS)
        cls.messages, cls.services = cls.stubs.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.stubs.__exit__(None, None, None)

    def run_against(self, states, refusal=None):
        agent = Scripted(self.messages, self.services, states, refusal)
        address = f"127.0.0.1:{agent.port}"
        flags = ["--agent", address, "--to", "10.0.0.2:7050", "--source-qmp", "/a", "--destination-qmp", "/b"]
        try:
            ended = subprocess.run(
                [sys.executable, PROGRAM, *flags, "--id", "vm-1"], capture_output=True, text=True, timeout=60
            )
        finally:
            agent.server.stop(None).wait()
        self.assertEqual(ended.stdout.count("\n"), 1, ended)
        return ended.returncode, json.loads(ended.stdout), agent.created

    def test_success_is_seen_from_discovery_to_end(self):
        code, seen, created = self.run_against(["PREPARING", "PRECOPY", "PRECOPY", "SWITCHING_OVER", "SUCCEEDED"])
        self.assertEqual(code, 0)
        self.assertIn("ramferry.v1.MigrationService", seen["services"])
        self.assertEqual(seen["states"], ["PREPARING", "PRECOPY", "SWITCHING_OVER", "SUCCEEDED"])
        self.assertEqual((seen["id"], seen["updates"], seen["state"]), ("vm-1", 5, "SUCCEEDED"))
        self.assertEqual(created.spec.destination_agent, "10.0.0.2:7050")
        self.assertTrue(created.request_id)

    def test_any_other_end_is_a_failure(self):
        code, seen, _ = self.run_against(["PRECOPY", "CANCELLED"])
        self.assertEqual((code, seen["state"]), (1, "CANCELLED"))

    def test_stream_that_ends_early_is_a_failure(self):
        code, seen, _ = self.run_against(["PRECOPY"])
        self.assertEqual((code, seen["state"]), (1, "PRECOPY"))

    def test_refusal_is_told(self):
        code, seen, _ = self.run_against([], refusal="RAM is private")
        self.assertEqual((code, seen["error"]), (2, {"code": "FAILED_PRECONDITION", "message": "RAM is private"}))


if __name__ == "__main__":
    unittest.main()
