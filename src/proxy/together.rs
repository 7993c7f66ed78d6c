//! Many who ask the same at the same time get one answer: of a question that was put after they came.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Questions that are being asked, with the answer given last to each.
pub(super) struct Together<K, A> {
    asked: Mutex<HashMap<K, Arc<Question<A>>>>,
}

/// When it was put last, and the answer.
type Question<A> = tokio::sync::Mutex<Option<(Instant, A)>>;

impl<K, A> Default for Together<K, A> {
    fn default() -> Self {
        Together {
            asked: Mutex::default(),
        }
    }
}

impl<K: Hash + Eq + Clone, A: Clone> Together<K, A> {
    /// What `ask` answers, or what it has answered to somebody who put the same question after this call came: an older answer
    /// may be out of date. May be cancelled; the others go on.
    pub async fn ask<F: Future<Output = A>>(&self, key: &K, ask: impl FnOnce() -> F) -> A {
        let came = Instant::now();
        let question = Some(self.asked.lock().entry(key.clone()).or_default().clone());
        let asks = Asks {
            all: self,
            key,
            question,
        };
        let question = asks.question.as_ref().expect("until it is dropped");
        let mut last = question.lock().await;
        if let Some((put, answer)) = &*last
            && *put > came
        {
            return answer.clone();
        }
        let put = Instant::now();
        let answer = ask().await;
        *last = Some((put, answer.clone()));
        answer
    }
}

/// Somebody who asks. The last one to leave takes the question along: it may be about a name that somebody made up.
struct Asks<'a, K: Hash + Eq, A> {
    all: &'a Together<K, A>,
    key: &'a K,
    question: Option<Arc<Question<A>>>,
}

impl<K: Hash + Eq, A> Drop for Asks<'_, K, A> {
    fn drop(&mut self) {
        let mut asked = self.all.asked.lock();
        // Within the lock: of two who leave at once, one sees that it is the last.
        self.question = None;
        if asked
            .get(self.key)
            .is_some_and(|question| Arc::strong_count(question) == 1)
        {
            asked.remove(self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn who_comes_while_a_question_is_asked_shares_the_next_answer_and_never_that_one() {
        let together = Arc::new(Together::<&str, u32>::default());
        let (asked, go) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let ask = |key: &'static str| {
            let (together, asked, go) = (together.clone(), asked.clone(), go.clone());
            tokio::spawn(async move {
                let put = || async {
                    let n = asked.fetch_add(1, Ordering::SeqCst);
                    go.acquire().await.unwrap().forget();
                    n
                };
                together.ask(&key, put).await
            })
        };
        let first = ask("a");
        while asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        // On one thread: they have come before the first has its answer.
        let (second, third) = (ask("a"), ask("a"));
        tokio::task::yield_now().await;
        go.add_permits(10);
        assert_eq!(first.await.unwrap(), 0);
        assert_eq!([second.await.unwrap(), third.await.unwrap()], [1, 1]);
        assert_eq!(ask("a").await.unwrap(), 2, "nothing is kept");
        assert_eq!(ask("b").await.unwrap(), 3);
        assert!(together.asked.lock().is_empty());
    }

    #[tokio::test]
    async fn who_gives_up_leaves_nothing_behind_and_the_next_one_asks() {
        let together = Together::<u8, u8>::default();
        let never = together.ask(&1, std::future::pending::<u8>);
        assert!(tokio::time::timeout(Duration::from_millis(1), never).await.is_err());
        assert_eq!(together.ask(&1, || async { 7 }).await, 7);
        assert!(together.asked.lock().is_empty());
    }
}
