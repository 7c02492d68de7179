//! The CUDA backend: the whole table of cases with a GPU, a clean refusal without one.
//!
//! Without a GPU these tests print that they are skipped; with DDTAS_REQUIRE_GPU set
//! (benches/device.sh) a skip is a failure.

use ddtas::backend::cuda::{self, CudaBackend, CudaDevice};
use ddtas::backend::device::{Device, ElementType, Options, ResidentBatch, ResidentRows};
use ddtas::backend::{AutoDevice, Backend, DeviceSpec, auto, open};
use ddtas::loss::{Embeddings, LossOutput, LossSettings, UnitCheck};
use ddtas::{Error, Result};
use ddtas_cases::{self as cases, AtBounds, check_at_bounds, parts};

/// Unwraps what a test opened on the first GPU; on an error, prints it as the reason for skipping the test.
fn gpu<T>(opened: Result<T>) -> Option<T> {
    match opened {
        Ok(opened) => Some(opened),
        Err(reason) => {
            assert!(std::env::var_os("DDTAS_REQUIRE_GPU").is_none(), "a GPU is required: {reason}");
            println!("skipped: {reason}");
            None
        }
    }
}

#[test]
fn golden_cases_agree() {
    let Some(mut backend) = gpu(cuda::open(0, Options::default())) else { return };
    cases::run_all(&mut *backend, cases::golden());
}

#[test]
fn every_type_and_form_agrees() {
    let Some(mut backend) = gpu(cuda::open(0, Options::default())) else { return };
    cases::run_all(&mut *backend, cases::generated());
}

#[test]
fn the_table_of_cases_agrees_in_parts() {
    if gpu(cuda::open(0, Options::default())).is_none() {
        return;
    }
    let open = |part: usize| {
        let budget = (part == 0).then_some(0);
        cuda::open(0, Options { budget, ..Options::default() }).expect("opened above")
    };
    parts::run_all(open, cases::generated());
    parts::check_memory(open);
    parts::check_identity(&mut *open(0));
    parts::check_identity(&mut *open(1));
}

#[test]
fn golden_cases_agree_when_nothing_is_stored() {
    let Some(mut backend) = gpu(cuda::open(0, Options { budget: Some(0), ..Options::default() })) else {
        return;
    };
    cases::run_all(&mut *backend, cases::golden());
}

#[test]
fn every_type_and_form_agrees_when_nothing_is_stored() {
    let Some(mut backend) = gpu(cuda::open(0, Options { budget: Some(0), ..Options::default() })) else {
        return;
    };
    cases::run_all(&mut *backend, cases::generated());
}

#[test]
fn every_width_and_lists_of_wide_rows_agree_stored_or_not() {
    for budget in [None, Some(0)] {
        let Some(mut backend) = gpu(cuda::open(0, Options { budget, ..Options::default() })) else { return };
        cases::run_all(&mut *backend, cases::widths());
        cases::run_all(&mut *backend, [ElementType::F16, ElementType::Bf16].map(cases::sparse));
    }
}

#[test]
fn similarities_at_the_bounds_count_alike_in_all_passes() {
    for (dtype, tf32) in
        ElementType::ALL.map(|dtype| (dtype, false)).into_iter().chain([(ElementType::F32, true)])
    {
        for (count, dim) in [(1440, 16), (1440, 256), (1440, 1024)] {
            if gpu(cuda::open(0, Options::default())).is_none() {
                return;
            }
            check_at_bounds(AtBounds { count, dim, dtype, tf32, reversed: true }, |budget| {
                cuda::open(0, Options { budget: Some(budget), tf32 }).expect("opened above")
            });
        }
    }
}

#[test]
fn golden_cases_agree_on_a_stream_of_the_caller() {
    // SAFETY: null is the default stream, which every context has.
    let Some(device) = gpu(unsafe { CudaDevice::on_stream(0, std::ptr::null_mut()) }) else { return };
    cases::run_all(&mut CudaBackend::new(device, Options::default()), cases::golden());
}

#[test]
fn tf32_products_are_those_of_the_rounded_rows() {
    for budget in [None, Some(0)] {
        let Some(mut backend) = gpu(cuda::open(0, Options { tf32: true, budget })) else { return };
        cases::run_all_tf32(&mut *backend, cases::golden());
        cases::run_all_tf32(&mut *backend, cases::generated_to_round());
    }
}

#[test]
fn rows_in_gpu_memory_give_the_bits_of_rows_from_the_host() {
    let Some(device) = gpu(CudaDevice::new(0)) else { return };
    let mut backend = CudaBackend::new(device, Options::default());
    let mut memory = CudaDevice::new(0).unwrap();
    let case = cases::golden().into_iter().find(|case| case.name == "odd_sizes_257x130").unwrap();
    let batch = case.batch();
    let Embeddings::F32(rows) = batch.anchors.embeddings else { panic!("golden cases are f32") };
    let mut host = LossOutput::default();
    backend.loss(&batch, &LossSettings::default(), &mut host).unwrap();

    let rows: &[u8] = bytemuck::cast_slice(rows.to_slice().unwrap());
    let labels: &[u8] = bytemuck::cast_slice(batch.anchors.labels);
    let mut upload = |bytes: &[u8]| {
        let mut buffer = memory.allocate(bytes.len()).unwrap();
        memory.upload(&mut buffer, 0, bytes).unwrap();
        buffer
    };
    let (rows_there, labels_there, gradient_there) =
        (upload(rows), upload(labels), upload(&vec![0; rows.len()]));
    let anchors = ResidentRows {
        count: 257,
        embeddings: memory.address(&rows_there),
        labels: memory.address(&labels_there),
        gradient: memory.address(&gradient_there),
    };
    let resident = ResidentBatch {
        dim: 130,
        dtype: ElementType::F32,
        anchors,
        references: None,
        check: UnitCheck::Check,
    };
    let mut own = LossOutput::default();
    // SAFETY: the three buffers hold what `resident` says, and live to the end of the test.
    unsafe { backend.loss_resident(&resident, &LossSettings::default(), &mut own) }.unwrap();
    let mut gradient = vec![0u8; rows.len()];
    memory.download(&gradient_there, 0, &mut gradient).unwrap();
    assert_eq!(own.loss, host.loss);
    assert_eq!(gradient, bytemuck::cast_slice::<f32, u8>(host.gradient.as_slice().unwrap()));
}

#[test]
fn a_gpu_that_does_not_exist_is_refused_in_one_line() {
    let Err(error) = open(&DeviceSpec::Cuda(4096)) else { panic!("nobody has 4097 GPUs") };
    let message = error.to_string();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    assert!(!message.contains('\n'), "{message}");
    assert!(message.ends_with(": use the device cpu"), "{message}");
    // Without a GPU the message gives another reason: no driver, or a driver that finds no GPU.
    assert!(message.contains("cuda:4096") || cuda::check(0).is_err(), "{message}");
}

#[test]
fn auto_takes_the_first_gpu_or_says_why_it_cannot() {
    let AutoDevice { spec, reason } = auto();
    assert_eq!(spec, if cuda::check(0).is_ok() { DeviceSpec::Cuda(0) } else { DeviceSpec::Cpu });
    assert_eq!(reason, cuda::check(0).err().map(|error| error.to_string()));
}

#[test]
fn device_count_and_check_agree() {
    let count = cuda::device_count().unwrap_or(0);
    // With a GPU, check(0) may pass or fail: the GPU may be too old.
    assert!(count > 0 || matches!(cuda::check(0), Err(Error::Unavailable(_))));
    assert!(matches!(cuda::check(count), Err(Error::Unavailable(_))));
}
