//! What goes to the source's agent: on the control stream that it opened last.

use std::sync::MutexGuard;

use ramferry_engine::DestinationEvent;
use ramferry_fabric::windows::WindowId;
use ramferry_mover::{PeerAnswer, RegisteredWindow, WindowsAnswer};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_ram::PageSets;
use tokio::sync::mpsc;
use tonic::Status;

use super::DestinationSession;

/// Answers that wait for the network.
const ANSWERS: usize = 1024;
/// Runs that one message of presence carries.
const PRESENCE_RUNS: usize = 16 * 1024;

/// What a control stream's caller receives.
pub(crate) type AnswerStream = mpsc::Receiver<Result<v1::ExchangeControlResponse, Status>>;
type AnswerSender = mpsc::Sender<Result<v1::ExchangeControlResponse, Status>>;

/// The control stream's answers, and where they go.
#[derive(Default)]
pub(super) struct Answers {
    stream: Option<AnswerSender>,
    /// The stream on which the final answer went out.
    final_on: Option<u64>,
    /// Counts the streams that were opened.
    pub(super) opened: u64,
    waiting: Vec<Answer>,
}

impl Answers {
    fn note_final(&mut self, answer: &Answer) {
        let is_final = match answer {
            Answer::Running(running) => !running.memory_owed,
            Answer::Aborted(_) | Answer::Lost(_) => true,
            _ => false,
        };
        if self.stream.is_some() && is_final {
            self.final_on = Some(self.opened);
        }
    }
}

impl DestinationSession {
    /// A defect of ours: the source learns from the end of the stream that nobody answers any more.
    pub(super) fn hang_up(&self) {
        self.close();
        self.answers().stream = None;
    }

    /// Whether the final answer went out on control stream `number`.
    pub(crate) fn has_told(&self, number: u64) -> bool {
        self.answers().final_on == Some(number)
    }

    /// Whether a control stream is open on which the final answer did not go out.
    pub(crate) fn is_untold(&self) -> bool {
        let answers = self.answers();
        answers.stream.is_some() && answers.final_on != Some(answers.opened)
    }

    /// Whether a control stream is open.
    pub(crate) fn is_connected(&self) -> bool {
        self.answers().stream.as_ref().is_some_and(|stream| !stream.is_closed())
    }

    /// A control stream was opened: what waits goes out on it first. An older
    /// stream ends. Returns the answers and the stream's number.
    pub(crate) fn attach(&self) -> (AnswerStream, u64) {
        let mut answers = self.answers();
        let waiting = std::mem::take(&mut answers.waiting);
        let (sender, stream) = mpsc::channel(ANSWERS + waiting.len() + 1);
        for answer in waiting {
            sender.try_send(Ok(response(answer))).expect("there is room for what waited");
        }
        answers.stream = Some(sender);
        answers.opened += 1;
        (stream, answers.opened)
    }

    /// Resolves when nobody hears control stream `number` any more.
    pub(crate) async fn unheard(&self, number: u64) {
        let stream = {
            let answers = self.answers();
            answers.stream.clone().filter(|_| answers.opened == number)
        };
        if let Some(stream) = stream {
            stream.closed().await;
        }
    }

    /// Control stream `number` ended.
    pub(crate) fn detach(&self, number: u64) {
        let mut answers = self.answers();
        if answers.opened == number {
            answers.stream = None;
            drop(answers);
            self.handle.send(DestinationEvent::PeerLost);
        }
    }

    /// Answers from a thread that may block. Before the first stream is opened
    /// answers wait for it; later they are lost with a lost stream.
    pub(crate) fn answer_blocking(&self, answer: Answer) -> bool {
        let sender = {
            let mut answers = self.answers();
            if answers.opened == 0 {
                answers.waiting.push(answer);
                return true;
            }
            answers.note_final(&answer);
            answers.stream.clone()
        };
        sender.is_some_and(|sender| sender.blocking_send(Ok(response(answer))).is_ok())
    }

    /// Answers from where nothing may block; the queue of a new stream has room.
    pub(crate) fn answer_soon(&self, answer: Answer) {
        if let Some(sender) = &self.answers().stream {
            let _ = sender.try_send(Ok(response(answer)));
        }
    }

    pub(crate) async fn answer(&self, answer: Answer) -> bool {
        let sender = {
            let mut answers = self.answers();
            answers.note_final(&answer);
            answers.stream.clone()
        };
        match sender {
            Some(sender) => sender.send(Ok(response(answer))).await.is_ok(),
            None => false,
        }
    }

    pub(super) fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().expect("no panic while it is held")
    }

    pub(super) fn answer_of_the_data_plane(&self, answer: PeerAnswer) -> bool {
        match answer {
            PeerAnswer::Presence(pages) => self.tell_presence(&pages),
            PeerAnswer::Windows(WindowsAnswer::Registered(windows)) => {
                self.answer_blocking(Answer::WindowsRegistered(windows_registered(windows)))
            }
            PeerAnswer::Windows(WindowsAnswer::Released(ids)) => {
                self.answer_blocking(Answer::WindowsReleased(windows_released(&ids)))
            }
            PeerAnswer::StillOwed(bytes) => self.answer_blocking(Answer::StillOwed(v1::StillOwed { bytes })),
            // Others are on their way.
            PeerAnswer::ReadersLost if self.is_opening() => true,
            PeerAnswer::ReadersLost => {
                let message = "others are needed".into();
                self.answer_blocking(Answer::ReadsLost(v1::ReadsLost { message }))
            }
            PeerAnswer::Digests(digests) => {
                let blocks = digests.iter().map(|digest| digest.as_bytes().to_vec()).collect();
                self.answer_blocking(Answer::Digests(v1::Digests { blocks }))
            }
        }
    }

    fn tell_presence(&self, pages: &PageSets) -> bool {
        for (block, set) in pages.iter() {
            let runs: Vec<_> = set.runs().collect();
            for runs in runs.chunks(PRESENCE_RUNS) {
                let runs = runs.iter().flat_map(|run| [run.first, run.count]).collect();
                let pages = vec![v1::PageRuns { block: block.0, runs }];
                if !self.answer_blocking(Answer::Presence(v1::DestinationPresence { pages, last: false })) {
                    return false;
                }
            }
        }
        self.answer_blocking(Answer::Presence(v1::DestinationPresence { pages: Vec::new(), last: true }))
    }
}

/// What became of windows, as it goes over the wire.
pub(crate) fn windows_registered(windows: Vec<RegisteredWindow>) -> v1::WindowsRegistered {
    let windows = windows.into_iter().map(|window| v1::RegisteredWindow {
        id: window.id.0,
        remote_key: window.key.as_ref().map_or(0, |key| key.0),
        nanoseconds: u64::try_from(window.elapsed.as_nanos()).unwrap_or(u64::MAX),
        error: window.key.err().unwrap_or_default(),
    });
    v1::WindowsRegistered { windows: windows.collect() }
}

/// Windows that were released, as they go over the wire.
pub(crate) fn windows_released(ids: &[WindowId]) -> v1::WindowsReleased {
    v1::WindowsReleased { ids: ids.iter().map(|id| id.0).collect() }
}

fn response(answer: Answer) -> v1::ExchangeControlResponse {
    v1::ExchangeControlResponse { answer: Some(answer) }
}
