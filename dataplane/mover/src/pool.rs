use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

type Work = Box<dyn FnOnce() + Send>;

/// A few named threads that run closures in the order given. Closing it lets
/// them finish what is queued, and does not wait for that.
#[derive(Debug)]
pub(crate) struct Pool {
    queue: Mutex<Option<Sender<Work>>>,
}

impl Pool {
    pub(crate) fn new(name: &str, threads: usize) -> Self {
        let (queue, work) = channel::<Work>();
        let work = Arc::new(Mutex::new(work));
        for index in 0..threads.max(1) {
            let work = Arc::clone(&work);
            let builder = thread::Builder::new().name(format!("{name}-{index}"));
            builder.spawn(move || run(&work)).expect("the kernel gives a thread");
        }
        Self { queue: Mutex::new(Some(queue)) }
    }

    /// Queues `work`; drops it when the pool is closed.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) {
        if let Some(queue) = &*self.queue.lock().expect("no panic while it is held") {
            // A send fails only when every thread has panicked.
            let _ = queue.send(Box::new(work));
        }
    }

    pub(crate) fn close(&self) {
        self.queue.lock().expect("no panic while it is held").take();
    }
}

fn run(work: &Mutex<Receiver<Work>>) {
    loop {
        let next = work.lock().expect("no panic while it is held").recv();
        match next {
            Ok(work) => work(),
            Err(_) => return,
        }
    }
}
