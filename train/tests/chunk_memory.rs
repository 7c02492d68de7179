//! A batch in chunks takes the memory of a chunk. The only test of its process, whose memory is counted.
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use burn::tensor::Device;
use ddtas::backend::cpu::CpuBackend;
use ddtas_train::data::ImageBatch;
use ddtas_train::model::EmbeddingNetwork;
use ddtas_train::train::{Engine, TrainSettings};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SIDE: usize = 24;

#[test]
fn a_step_in_chunks_takes_less_memory() {
    let device = Device::flex().autodiff();
    let peak = |chunk_size| {
        let mut settings = TrainSettings { width: 8, embedding_dim: 10, ..TrainSettings::default() };
        settings.optimizer.chunk_size = chunk_size;
        let network = EmbeddingNetwork::new(&settings.network_shape(), &device);
        let mut engine = Engine::new(network, &settings, Box::new(CpuBackend::new()), None, device.clone());
        let values = 96 * 3 * SIDE * SIDE;
        let batch = ImageBatch {
            pixels: (0..values).map(|at| (at as f32 * 0.7).sin()).collect(),
            labels: (0..96).map(|row| row / 4).collect(),
            indices: (0..96).collect(),
            own: 0..96,
            image_size: SIDE,
            replaced: 0,
        };
        let before = PeakAlloc.current_usage();
        PeakAlloc.reset_peak_usage();
        assert!(engine.step(0, &batch, None).unwrap());
        PeakAlloc.peak_usage() - before
    };
    let (whole, chunked) = (peak(0), peak(8));
    println!("peak of a step of 96 pictures: {whole} bytes, {chunked} in chunks of 8");
    assert!(3 * chunked < whole, "{chunked} of {whole} bytes");
}
