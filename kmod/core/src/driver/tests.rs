use super::*;

#[test]
fn a_driver_that_was_not_started_is_finished() {
    struct NoFrames;
    impl Frames for NoFrames {
        fn frame(&mut self, _slot: u16) -> Option<&mut [u8]> {
            None
        }
    }
    let mut driver = Driver::new();
    assert_eq!(
        driver.step(Instant::from_micros(0), &mut NoFrames),
        Next::Finished(Action::None)
    );
}
