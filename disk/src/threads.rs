//! Where work that waits for a disk is done.

use std::future::Future;

use futures::executor::block_on;
use tokio::runtime::Handle;
use tokio::task::JoinError;

/// Which threads wait for the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threads {
    /// Threads of their own, so that nothing else waits with them.
    #[default]
    Own,
    /// Tasks on the runtime of the caller, for a disk that waits without blocking: with these, all
    /// that a node does is done by one thread, one step after the other.
    Callers,
}

impl Threads {
    /// Starts a worker that goes on until its future ends.
    ///
    /// # Errors
    /// The system gives no thread.
    ///
    /// # Panics
    /// Tasks need a runtime around the caller.
    pub fn start(
        self,
        name: &str,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<Worker> {
        match self {
            Self::Own => std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || block_on(work))
                .map(Worker::Thread),
            Self::Callers => Ok(Worker::Task(tokio::spawn(work))),
        }
    }

    /// For single pieces of work, on the runtime around the caller.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn blocking(self) -> Blocking {
        Blocking {
            threads: self,
            runtime: Handle::current(),
        }
    }
}

/// What [`Threads::start`] has started.
#[derive(Debug)]
pub enum Worker {
    /// A thread.
    Thread(std::thread::JoinHandle<()>),
    /// A task.
    Task(tokio::task::JoinHandle<()>),
}

impl Worker {
    /// Returns when it has ended; false if it panicked.
    pub async fn ended(self) -> bool {
        match self {
            Self::Thread(thread) => {
                let joined = tokio::task::spawn_blocking(move || thread.join()).await;
                matches!(joined, Ok(Ok(())))
            }
            Self::Task(task) => task.await.is_ok(),
        }
    }
}

/// Does pieces of work that wait for the disk, each to its end whatever becomes of who asked.
#[derive(Clone, Debug)]
pub struct Blocking {
    threads: Threads,
    runtime: Handle,
}

impl Blocking {
    /// The result of this work.
    ///
    /// # Errors
    /// It panicked, or the runtime is ending.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, JoinError> {
        match self.threads {
            Threads::Own => self.runtime.spawn_blocking(move || block_on(work)).await,
            Threads::Callers => self.runtime.spawn(work).await,
        }
    }
}
