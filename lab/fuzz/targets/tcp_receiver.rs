//! A connection of the tcp fabric at the side that is written to: frames of a peer that has the session's token.
//! A key below `KEYS` stands for a region's, which nobody could guess.
#![no_main]

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use ramferry_fabric::{Domain, MappedDomain, Rights, fuzzing};
use ramferry_fuzz::{PAGE, memory, range};
use ramferry_ram::Memory;

const HEADER_BYTES: usize = 32;
const KEYS: usize = 4;
const GOODBYE: u8 = 4;
const FENCE_ACK: u8 = 0x82;
const READ_DATA: u8 = 0x81;
const ERROR: u8 = 0x83;

/// Pages 0 may be written, 2 read, 4 and 5 both, 7 neither; the others are not registered.
struct Side {
    memory: Arc<Memory>,
    domain: Arc<MappedDomain>,
    keys: [u64; KEYS],
}

static SIDE: LazyLock<Side> = LazyLock::new(|| {
    let memory = memory(8);
    let domain = Arc::new(MappedDomain::new(Arc::clone(&memory)).expect("presence is known"));
    let both = Rights { remote_write: true, remote_read: true };
    let regions =
        [(0, 1, Rights::REMOTE_WRITE), (2, 1, Rights::REMOTE_READ), (4, 2, both), (7, 1, Rights::LOCAL)];
    let keys = regions.map(|(page, pages, rights)| {
        let region = domain.register(range(page * PAGE, pages * PAGE), rights);
        region.expect("a region").key.0
    });
    Side { memory, domain, keys }
});

/// Connections to hear out, and what was heard.
type Ear = (Sender<UnixStream>, Receiver<Vec<u8>>);

/// Hears what the receiver says, on a thread of its own: it says more than a socket holds.
static EAR: LazyLock<Mutex<Ear>> = LazyLock::new(|| {
    let (connections, queue) = channel::<UnixStream>();
    let (heard, answers) = channel();
    std::thread::spawn(move || {
        for mut connection in queue {
            let mut bytes = Vec::new();
            let _ = connection.read_to_end(&mut bytes);
            if heard.send(bytes).is_err() {
                return;
            }
        }
    });
    Mutex::new((connections, answers))
});

fuzz_target!(|data: &[u8]| {
    let _ = fuzzing::hello(data);
    let side = &*SIDE;
    for page in 0..8 {
        side.memory
            .span(range(page * PAGE, PAGE))
            .expect("a page")
            .write_from(&[page as u8 + 1; PAGE as usize]);
    }
    let (mut peer, ours) = UnixStream::pair().expect("a pair of sockets");
    peer.write_all(&with_keys(data, &side.keys)).expect("a socket takes so little");
    peer.shutdown(std::net::Shutdown::Write).expect("a socket that is open");
    let ear = EAR.lock().expect("one at a time");
    ear.0.send(peer).expect("it hears");
    let (result, placed_bytes) = fuzzing::serve_tcp(OwnedFd::from(ours), Arc::clone(&side.domain));
    let answers = ear.1.recv().expect("it hears");

    assert!(placed_bytes <= data.len() as u64, "more bytes than came");
    assert!(result.is_err() || data.contains(&GOODBYE), "it ends well only where the peer took leave");
    for page in [1, 2, 3, 6, 7] {
        let mut bytes = [0; PAGE as usize];
        side.memory.span(range(page * PAGE, PAGE)).expect("a page").read_into(&mut bytes);
        assert!(bytes.iter().all(|byte| *byte == page as u8 + 1), "page {page} was written to");
    }
    check_answers(&answers, side);
});

/// The frames in `data`, with regions' keys where their numbers are.
fn with_keys(data: &[u8], keys: &[u64; KEYS]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let mut rest = &mut bytes[..];
    while let Some((header, tail)) = rest.split_at_mut_checked(HEADER_BYTES) {
        let key = u64::from_le_bytes(header[16..24].try_into().expect("8 bytes"));
        if let Some(key) = usize::try_from(key).ok().and_then(|key| keys.get(key)) {
            header[16..24].copy_from_slice(&key.to_le_bytes());
        }
        let length = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes")) as usize;
        let body = if header[0] == 1 { length } else { 0 };
        let Some((_, tail)) = tail.split_at_mut_checked(body) else { break };
        rest = tail;
    }
    bytes
}

/// Whole frames of the kinds that answer, an error only as the last, and what may not be read is not in them.
fn check_answers(mut answers: &[u8], side: &Side) {
    while let Some((header, rest)) = answers.split_at_checked(HEADER_BYTES) {
        let length = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes")) as usize;
        match header[0] {
            FENCE_ACK => answers = rest,
            ERROR => {
                assert!(rest.is_empty(), "an error is the last word");
                return;
            }
            READ_DATA => {
                assert!(length as u64 <= 2 * PAGE, "a region is no longer");
                let (_, rest) = rest.split_at_checked(length).expect("all that was announced");
                answers = rest;
            }
            other => panic!("opcode {other} is no answer"),
        }
    }
    assert!(answers.is_empty(), "{} bytes of a frame", answers.len());
    assert_eq!(side.domain.pinned_bytes(), 5 * PAGE);
}
