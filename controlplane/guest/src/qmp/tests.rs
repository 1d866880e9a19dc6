use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;
const LIMIT: Duration = Duration::from_secs(5);

/// The other end of a connection, scripted.
struct Server {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Server {
    /// A client that has negotiated with this server, each of its commands limited to `limit`.
    async fn serve(limit: Duration) -> (QmpClient, Server) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, writer) = theirs.into_split();
        let mut server = Server { reader: BufReader::new(read), writer };
        let negotiated = async {
            server.say(GREETING).await;
            server.answer(|id| json!({ "return": {}, "id": id })).await;
        };
        let (client, ()) = tokio::join!(QmpClient::negotiate(ours, limit), negotiated);
        (client.unwrap(), server)
    }

    async fn say(&mut self, line: &str) {
        self.writer.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn answer(&mut self, reply: impl FnOnce(Value) -> Value) {
        let command = self.hear().await;
        self.say(&reply(command["id"].clone()).to_string()).await;
    }
}

#[tokio::test]
async fn replies_reach_their_commands_in_any_order() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let script = async {
        let (first, second) = (server.hear().await, server.hear().await);
        for command in [second, first] {
            server.say(r#"{"event": "RTC_CHANGE", "timestamp": {"seconds": 1, "microseconds": 2}}"#).await;
            server.say(&json!({ "id": command["id"], "return": command["execute"] }).to_string()).await;
        }
    };
    let (a, b, ()) = tokio::join!(
        client.execute::<String>("a", json!({})),
        client.execute::<String>("b", json!({})),
        script
    );
    assert_eq!((a.unwrap(), b.unwrap()), ("a".to_owned(), "b".to_owned()));
    assert_eq!(client.version().to_string(), "7.2.22");
}

#[tokio::test]
async fn what_was_meant_for_an_earlier_client_is_passed_over() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, writer) = theirs.into_split();
    let mut server = Server { reader: BufReader::new(read), writer };
    let script = async {
        server.say(r#"onds": 2}, "event": "STOP"}"#).await;
        server.say(r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}"#).await;
        server.say(GREETING).await;
        server.say(r#"{"return": {"status": "running"}, "id": 1}"#).await;
        server.answer(|id| json!({ "return": {}, "id": id })).await;
    };
    let (client, ()) = tokio::join!(QmpClient::negotiate(ours, LIMIT), script);
    assert!(!client.unwrap().has_ended());
}

#[tokio::test]
async fn commands_out_of_band_are_marked_and_were_negotiated() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, writer) = theirs.into_split();
    let mut server = Server { reader: BufReader::new(read), writer };
    let script = async {
        server.say(GREETING).await;
        let negotiation = server.hear().await;
        assert_eq!(negotiation["arguments"], json!({ "enable": ["oob"] }));
        server.say(&json!({ "return": {}, "id": negotiation["id"] }).to_string()).await;
        let command = server.hear().await;
        assert_eq!((&command["exec-oob"], &command["execute"]), (&json!("yank"), &Value::Null));
        server.say(&json!({ "return": {}, "id": command["id"] }).to_string()).await;
    };
    let client = async {
        let client = QmpClient::negotiate(ours, LIMIT).await.unwrap();
        client.run_out_of_band("yank", json!({ "instances": [] })).await.unwrap();
    };
    tokio::join!(client, script);
}

#[tokio::test]
async fn events_carry_their_time() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let mut events = client.events();
    server.say(r#"{"event": "STOP", "timestamp": {"seconds": 10, "microseconds": 5}}"#).await;
    server.say(r#"{"event": "X", "data": {"a": 1}, "timestamp": {"seconds": -1, "microseconds": -1}}"#).await;
    let stop = events.recv().await.unwrap();
    assert_eq!((stop.name.as_str(), stop.data), ("STOP", Value::Null));
    assert_eq!(stop.timestamp, SystemTime::UNIX_EPOCH + Duration::from_micros(10_000_005));
    assert_eq!(events.recv().await.unwrap().data, json!({ "a": 1 }));
}

#[tokio::test]
async fn a_refusal_keeps_qemus_words() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let refusal = |id| json!({ "id": id, "error": { "class": "CommandNotFound", "desc": "no such" } });
    let (result, ()) = tokio::join!(client.run("nonsense", json!({})), server.answer(refusal));
    let error = result.unwrap_err();
    assert!(error.is_class("CommandNotFound"));
    assert_eq!(error.to_string(), "QEMU refused nonsense: no such");
}

#[tokio::test]
async fn a_result_may_be_null_or_of_another_form() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let null = |id| json!({ "id": id, "return": null });
    let (result, ()) = tokio::join!(client.execute::<Option<u8>>("a", json!({})), server.answer(null));
    assert_eq!(result.unwrap(), None);
    let (result, ()) = tokio::join!(client.execute::<u8>("a", json!({})), server.answer(null));
    assert!(matches!(result, Err(QmpError::Reply { .. })));
    assert!(!client.has_ended());
}

#[tokio::test]
async fn a_command_without_answer_times_out_and_its_late_reply_is_ignored() {
    let (client, mut server) = Server::serve(Duration::from_millis(50)).await;
    let late = client.run("slow", json!({})).await;
    assert!(matches!(late, Err(QmpError::Timeout { .. })));
    server.answer(|id| json!({ "id": id, "return": 1 })).await;
    let next = |id| json!({ "id": id, "return": 2 });
    let (result, ()) = tokio::join!(client.execute::<u8>("next", json!({})), server.answer(next));
    assert_eq!(result.unwrap(), 2);
    assert!(client.shared.pending().replies.is_empty());
}

#[tokio::test]
async fn a_command_that_is_dropped_disturbs_no_other() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let dropped = timeout(Duration::from_millis(20), client.run("dropped", json!({}))).await;
    assert!(dropped.is_err());
    server.answer(|id| json!({ "id": id, "return": 1 })).await;
    let next = |id| json!({ "id": id, "return": 2 });
    let (result, ()) = tokio::join!(client.execute::<u8>("next", json!({})), server.answer(next));
    assert_eq!(result.unwrap(), 2);
}

#[tokio::test]
async fn every_pending_command_learns_that_the_connection_ended() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let close = async {
        server.hear().await;
        server.hear().await;
        drop(server);
    };
    let (a, b, ()) = tokio::join!(client.run("a", json!({})), client.run("b", json!({})), close);
    assert!(a.unwrap_err().has_ended() && b.unwrap_err().has_ended());
    assert!(matches!(client.ended().await, Ended::Closed | Ended::Io(_)));
    assert!(client.run("c", json!({})).await.unwrap_err().has_ended());
}

#[tokio::test]
async fn garbage_ends_the_connection_with_an_excerpt() {
    for garbage in [
        "nonsense",
        "[]",
        "{}",
        r#"{"id": "a", "return": {}}"#,
        r#"{"return": {}}"#,
        r#"{"id": 9, "error": "text"}"#,
        r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#,
        &"[".repeat(100_000),
        "\u{fffd}\0",
    ] {
        let (client, mut server) = Server::serve(LIMIT).await;
        server.say(garbage).await;
        match client.ended().await {
            Ended::Garbage { excerpt } => assert!(garbage.starts_with(excerpt.trim_end())),
            other => panic!("{garbage:.20}: {other}"),
        }
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_end_the_connection() {
    let (client, mut server) = Server::serve(LIMIT).await;
    server.writer.write_all(b"\xff\xfe\x80\n").await.unwrap();
    assert!(matches!(client.ended().await, Ended::Garbage { .. }));
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let (client, mut server) = Server::serve(LIMIT).await;
    let flood = async {
        let block = vec![b' '; 1 << 20];
        while server.writer.write_all(&block).await.is_ok() {}
    };
    let (ended, ()) = tokio::join!(
        async {
            let ended = client.ended().await;
            drop(client);
            ended
        },
        flood
    );
    assert!(matches!(ended, Ended::TooLong));
}

#[tokio::test]
async fn a_server_that_is_no_qemu_is_told_from_one_that_is_silent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let missing = QmpClient::connect(&path, LIMIT).await;
    assert!(matches!(missing, Err(QmpError::Connect { .. })));
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let started = Instant::now();
    let silent = QmpClient::connect(&path, Duration::from_millis(50)).await;
    assert!(matches!(silent, Err(QmpError::Silent { .. })));
    assert!(started.elapsed() < LIMIT);
    drop(listener.accept().await.unwrap());
    let other = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"SSH-2.0\n").await.unwrap();
    };
    let (result, ()) = tokio::join!(QmpClient::connect(&path, LIMIT), other);
    assert!(matches!(result, Err(QmpError::Ended(Ended::Garbage { .. }))));
}

#[tokio::test]
async fn the_process_behind_the_socket_is_known() {
    let (client, _server) = Server::serve(LIMIT).await;
    assert_eq!(client.peer_pid(), Some(std::process::id()));
}
