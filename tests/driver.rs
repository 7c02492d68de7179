//! The CUDA backend's calls to the driver, recorded by a fake driver that computes nothing (driver/driver.c;
//! needs gcc). It has libcuda's soname and is loaded first, so that the backend finds it in libcuda's place.
#![cfg(target_os = "linux")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "calls into a library of this test's own, with live memory"
)]
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use ddtas::Error;
use ddtas::backend::cuda::{self, CudaBackend, CudaDevice, Gpu};
use ddtas::backend::device::{
    ElementType, Options, ResidentBatch, ResidentIdentity, ResidentNumbers, ResidentOutput, ResidentPart,
    ResidentRows, ResidentSettings,
};
use ddtas::backend::{AutoDevice, Backend, DeviceSpec, auto};
use ddtas::capi::*;
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows, UnitCheck};
use ndarray::Array2;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn fork() -> i32;
    fn waitpid(child: i32, status: *mut i32, options: i32) -> i32;
    fn alarm(seconds: u32) -> u32;
    fn _exit(status: i32) -> !;
}

/// The fake driver. Its state belongs to the process, so a lock runs the tests one after the other.
struct Fake {
    library: *mut c_void,
    _turn: MutexGuard<'static, ()>,
}

impl Fake {
    fn load() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<usize> = OnceLock::new();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let library = *LIBRARY.get_or_init(|| {
            let root = env!("CARGO_MANIFEST_DIR");
            let made = format!("{}/fake_driver.so", env!("CARGO_TARGET_TMPDIR"));
            let gcc = std::process::Command::new("gcc")
                .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so", "-o", &made])
                .arg(format!("{root}/tests/driver/driver.c"))
                .status();
            assert!(gcc.unwrap().success());
            let path = CString::new(made).unwrap();
            let library = unsafe { dlopen(path.as_ptr(), 2) };
            assert!(!library.is_null());
            let add: extern "C" fn(*const c_char) =
                unsafe { std::mem::transmute(symbol(library, "fake_kernel")) };
            let table = std::fs::read_to_string(format!("{root}/kernels/budgets.tsv")).unwrap();
            let mut names: Vec<&str> = table
                .lines()
                .filter(|line| !line.starts_with('#'))
                .filter_map(|line| line.split('\t').next())
                .collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                add(CString::new(name).unwrap().as_ptr());
            }
            library.expose_provenance()
        });
        let fake = Self { library: std::ptr::with_exposed_provenance_mut(library), _turn: turn };
        fake.set("fake_major", 8);
        fake
    }

    fn get(&self, name: &str) -> c_int {
        unsafe { symbol(self.library, name).cast::<c_int>().read() }
    }

    fn set(&self, name: &str, value: c_int) {
        unsafe { symbol(self.library, name).cast::<c_int>().write(value) };
    }

    fn set_pointer(&self, name: &str, value: *mut c_void) {
        unsafe { symbol(self.library, name).cast::<*mut c_void>().write(value) };
    }

    fn set_current(&self, context: *mut c_void) {
        let set: extern "C" fn(*mut c_void) -> c_int =
            unsafe { std::mem::transmute(symbol(self.library, "cuCtxSetCurrent")) };
        assert_eq!(set(context), 0);
    }

    fn current(&self) -> *mut c_void {
        let get: extern "C" fn(*mut *mut c_void) -> c_int =
            unsafe { std::mem::transmute(symbol(self.library, "cuCtxGetCurrent")) };
        let mut context = null_mut();
        assert_eq!(get(&raw mut context), 0);
        context
    }
}

fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    let found = unsafe { dlsym(library, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

fn rows() -> (Array2<f32>, Vec<i64>) {
    let angle = |i: usize| i as f32 * 0.37;
    let rows = Array2::from_shape_fn((200, 2), |(i, d)| if d == 0 { angle(i).cos() } else { angle(i).sin() });
    (rows, (0..200).map(|i| i / 3).collect())
}

#[test]
fn the_calling_thread_s_context_is_its_own_again_after_every_call() {
    let fake = Fake::load();
    let (e, labels) = rows();
    let mut gradient = Array2::<f32>::zeros((200, 2));
    let batch = Batch::square(e.view(), &labels);
    let side = ResidentRows {
        count: 200,
        embeddings: e.as_ptr() as u64,
        labels: labels.as_ptr() as u64,
        gradient: gradient.as_mut_ptr() as u64,
    };
    let (dtype, check) = (ElementType::F32, UnitCheck::Check);
    let resident = ResidentBatch { dim: 2, dtype, anchors: side, references: None, check };
    for before in [null_mut(), std::ptr::without_provenance_mut(0x1234)] {
        fake.set_current(before);
        let unchanged = |call: &str| assert_eq!(fake.current(), before, "after {call}");
        cuda::check(0).unwrap();
        unchanged("check");
        let mut backend = CudaBackend::new(CudaDevice::new(0).unwrap(), Options::default());
        unchanged("new");
        let (settings, mut output) = (LossSettings::default(), LossOutput::default());
        backend.loss(&batch, &settings, &mut output).unwrap();
        unchanged("loss");
        backend.threshold_gradient(&batch, e.view(), None).unwrap();
        unchanged("threshold_gradient");
        backend.nearest(&Rows::new(e.view(), &labels), None, 3).unwrap();
        unchanged("nearest");
        let rows = Rows::new(e.view(), &labels);
        backend.search(&rows, &mut |search| search.nearest(&rows, 3).map(drop)).unwrap();
        unchanged("search");
        unsafe { backend.loss_resident(&resident, &settings, &mut output) }.unwrap();
        unchanged("loss_resident");
        backend.anchors_of_last_loss(&mut output).unwrap();
        unchanged("anchors_of_last_loss");
        unsafe { backend.threshold_gradient_resident(&resident, [side.embeddings, 0]) }.unwrap();
        unchanged("threshold_gradient_resident");
        unsafe { backend.nearest_resident(&resident, None, 3) }.unwrap();
        unchanged("nearest_resident");
        assert_eq!(unsafe { backend.labels_resident(&side) }.unwrap(), labels);
        unchanged("labels_resident");
        drop(backend);
        unchanged("drop");

        let device = CString::new("cuda:0").unwrap();
        let mut options: ContextOptions = unsafe { std::mem::zeroed() };
        (options.struct_size, options.device) = (size_of::<ContextOptions>(), device.as_ptr());
        let mut context = null_mut();
        let status = unsafe { ddtas_context_create(&raw const options, &raw mut context, null_mut(), 0) };
        assert_eq!(status, Status::Ok);
        unchanged("ddtas_context_create");
        unsafe { ddtas_context_destroy(context) };
        unchanged("ddtas_context_destroy");
    }
    fake.set_current(null_mut());
    assert!(fake.get("fake_launches") > 20, "the passes were launched");
    assert_eq!(fake.get("fake_failures"), 0, "no call was refused, and none asked for what is not there");
    assert_eq!(fake.get("fake_retained"), 0, "every share in the context was given back");
}

#[test]
fn after_the_first_call_of_a_shape_nothing_is_allocated_copied_waited_for_or_looked_up() {
    let fake = Fake::load();
    let mut backend = CudaBackend::new(CudaDevice::new(0).unwrap(), Options::default());
    let (e, labels) = rows();
    // The driver computes nothing, so one buffer may serve as every list.
    let mut list = vec![0u64; 400];
    let address = list.as_mut_ptr() as u64;
    let (dtype, check) = (ElementType::F32, UnitCheck::Check);
    let side = |count, gradient| ResidentRows {
        count,
        embeddings: e.as_ptr() as u64,
        labels: labels.as_ptr() as u64,
        gradient,
    };
    let (anchors, references) = (side(90, address), Some(side(200, 0)));
    let batch = ResidentBatch { dim: 2, dtype, anchors, references, check };
    let part = ResidentPart { batch, identity: ResidentIdentity::From(0), total: 200, normalize: false };
    let square = ResidentBatch { anchors: side(200, address), references: None, ..batch };
    let whole = ResidentPart { batch: square, ..part };
    let settings = ResidentSettings { settings: LossSettings::default(), lambda: address };
    let output = ResidentOutput { scalars: address, loss: address };
    let numbers = ResidentNumbers { anchors: address, references: address, count: 200 };
    let run = |part: &ResidentPart, backend: &mut CudaBackend| unsafe {
        backend.enqueue_loss(part, &settings, output).unwrap();
        backend.enqueue_same_class(part, &settings, address).unwrap();
        let numbers = ResidentNumbers { count: part.batch.references.map_or(0, |_| 200), ..numbers };
        backend.enqueue_sweep(part, numbers, address, address).unwrap();
        backend.enqueue_select(part, numbers, address, [address; 2]).unwrap();
        backend.enqueue_gradient(part, [numbers; 2], address).unwrap();
    };
    run(&whole, &mut backend);
    run(&part, &mut backend);
    let (asked, launches) = (fake.get("fake_asked"), fake.get("fake_launches"));
    assert!(asked > 0);
    run(&part, &mut backend);
    run(&whole, &mut backend);
    assert_eq!(fake.get("fake_asked"), asked);
    assert!(fake.get("fake_launches") > launches + 30);
    // A loss that is waited for copies its scalars, and waits once.
    let waited = |backend: &mut CudaBackend| {
        let before = fake.get("fake_asked");
        unsafe { backend.loss_resident(&square, &settings.settings, &mut LossOutput::default()) }.unwrap();
        fake.get("fake_asked") - before
    };
    waited(&mut backend);
    assert_eq!(waited(&mut backend), 2);
    assert_eq!(fake.get("fake_failures"), 0);
}

#[test]
fn kernels_overlap_their_starts_where_the_gpu_can() {
    let fake = Fake::load();
    let (e, labels) = rows();
    for (major, all) in [(8, false), (9, true), (10, true)] {
        fake.set("fake_major", major);
        let mut backend = cuda::open(0, Options::default()).unwrap();
        let (before, overlapped) = (fake.get("fake_launches"), fake.get("fake_overlapped"));
        let mut output = LossOutput::default();
        backend.loss(&Batch::square(e.view(), &labels), &LossSettings::default(), &mut output).unwrap();
        let launches = fake.get("fake_launches") - before;
        assert!(launches >= 7, "{launches}");
        assert_eq!(fake.get("fake_overlapped") - overlapped, if all { launches } else { 0 }, "sm_{major}0");
    }
    assert_eq!(fake.get("fake_failures"), 0);
}

/// A loss of `count` rows as `ddtas.torch` issues it on torch's current stream.
fn issue(backend: &mut CudaBackend, stream: *mut c_void, count: usize) -> ddtas::Result<()> {
    let (e, labels) = rows();
    let mut list = vec![0u64; 400];
    let address = list.as_mut_ptr() as u64;
    let (embeddings, labels) = (e.as_ptr() as u64, labels.as_ptr() as u64);
    let anchors = ResidentRows { count, embeddings, labels, gradient: address };
    let (dtype, check) = (ElementType::F32, UnitCheck::Check);
    let batch = ResidentBatch { dim: 2, dtype, anchors, references: None, check };
    let part = ResidentPart { batch, identity: ResidentIdentity::ByValue, total: count, normalize: false };
    let settings = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
    let output = ResidentOutput { scalars: address, loss: 0 };
    unsafe { backend.device_mut().follow(stream) }.unwrap();
    let issued = unsafe { backend.enqueue_loss(&part, &settings, output) };
    backend.device_mut().mark().unwrap();
    issued
}

#[test]
fn a_device_outlives_the_streams_that_it_has_followed() {
    let fake = Fake::load();
    let streams: [*mut c_void; 2] = [0x10, 0x20].map(std::ptr::without_provenance_mut);
    let device = unsafe { CudaDevice::on_stream(0, streams[0]) }.unwrap();
    let mut backend = CudaBackend::new(device, Options::default());
    issue(&mut backend, streams[0], 100).unwrap();
    fake.set_pointer("fake_destroyed", streams[0]);
    let (asked, waits) = (fake.get("fake_asked"), fake.get("fake_waits"));
    issue(&mut backend, streams[1], 200).unwrap();
    assert!(fake.get("fake_asked") > asked, "more rows need new memory, and the old is freed");
    assert_eq!(fake.get("fake_waits"), waits + 1, "for what was issued on the dead stream");
    fake.set_pointer("fake_destroyed", streams[1]);
    drop(backend);
    assert_eq!(fake.get("fake_failures"), 0);
    assert!(unsafe { Gpu::new(0).unwrap().capture(streams[1]) }.is_err(), "the driver refuses a dead stream");
    fake.set("fake_failures", 0);
    fake.set_pointer("fake_destroyed", null_mut());
}

#[test]
fn a_device_follows_its_caller_from_stream_to_stream_and_into_a_capture() {
    let fake = Fake::load();
    let streams: [*mut c_void; 4] = [0x10, 0x20, 0x30, 0x40].map(std::ptr::without_provenance_mut);
    let device = unsafe { CudaDevice::on_stream(0, streams[0]) }.unwrap();
    let mut backend = CudaBackend::new(device, Options::default());
    let mut run = |stream, count| issue(&mut backend, stream, count);
    let waits = || fake.get("fake_waits");
    run(streams[0], 150).unwrap();
    run(streams[0], 150).unwrap();
    assert_eq!(waits(), 0, "the same stream");
    run(streams[1], 150).unwrap();
    assert_eq!(waits(), 1, "another one");
    fake.set_pointer("fake_captured", streams[2]);
    let gpu = Gpu::new(0).unwrap();
    let asked = fake.get("fake_asked");
    run(streams[2], 150).unwrap();
    assert_eq!(
        (waits(), fake.get("fake_asked")),
        (1, asked),
        "a capture waits for nothing outside and asks for nothing"
    );
    assert_eq!(unsafe { gpu.capture(streams[2]) }.unwrap(), Some(7));
    let refused = run(streams[2], 200).unwrap_err();
    assert!(refused.to_string().contains("while a graph is captured: call it once with this shape"));
    assert_eq!(fake.get("fake_asked"), asked);
    run(streams[2], 150).unwrap();
    assert_eq!(waits(), 1, "the same stream of the capture");
    fake.set_pointer("fake_captured_too", streams[3]);
    run(streams[3], 150).unwrap();
    run(streams[2], 150).unwrap();
    assert_eq!(waits(), 3, "branches of one capture, which share a workspace");
    fake.set_pointer("fake_captured", null_mut());
    fake.set_pointer("fake_captured_too", null_mut());
    run(streams[0], 200).unwrap();
    assert_eq!(waits(), 4, "after the capture");
    let per_thread = std::ptr::without_provenance_mut(2);
    run(per_thread, 150).unwrap();
    run(per_thread, 150).unwrap();
    assert_eq!(waits(), 6, "a stream that is another one in each thread");
    run(streams[0], 150).unwrap();
    fake.set("fake_reborn", 0x1000);
    run(streams[0], 150).unwrap();
    assert_eq!(waits(), 8, "a new stream at the address of one that was destroyed");
    fake.set("fake_reborn", 0);
    drop(backend);
    assert_eq!(fake.get("fake_failures"), 0);
}

#[test]
fn a_gpu_that_is_too_old_is_passed_over_by_auto_for_programs_and_the_c_abi() {
    let fake = Fake::load();
    let of_the_abi = || {
        let mut context = null_mut();
        let status = unsafe { ddtas_context_create(std::ptr::null(), &raw mut context, null_mut(), 0) };
        let mut name = [0u8; 16];
        let length = unsafe { ddtas_context_device(context, name.as_mut_ptr().cast(), name.len()) };
        unsafe { ddtas_context_destroy(context) };
        (status, String::from_utf8(name[..length].to_vec()).unwrap())
    };
    assert_eq!(auto().spec, DeviceSpec::Cuda(0));
    assert_eq!(of_the_abi(), (Status::Ok, "cuda:0".to_owned()));
    fake.set("fake_major", 7);
    let AutoDevice { spec, reason } = auto();
    assert_eq!(spec, DeviceSpec::Cpu);
    assert!(reason.unwrap().contains("compute capability 7.0"));
    assert_eq!(of_the_abi(), (Status::Ok, "cpu".to_owned()));
}

#[test]
fn a_forked_child_is_told_that_cuda_does_not_survive_a_fork() {
    let _fake = Fake::load();
    let mut backend = cuda::open(0, Options::default()).unwrap();
    let child = unsafe { fork() };
    if child == 0 {
        unsafe { alarm(30) };
        let (e, labels) = rows();
        let (batch, mut output) = (Batch::square(e.view(), &labels), LossOutput::default());
        let told =
            |error: Error| matches!(&error, Error::Unavailable(reason) if reason.contains("survive a fork"));
        let old = backend.loss(&batch, &LossSettings::default(), &mut output).is_err_and(told);
        let new = cuda::open(0, Options::default()).is_err_and(told);
        drop(backend);
        let falls_back = auto().spec == DeviceSpec::Cpu;
        unsafe { _exit(i32::from(!(old && new && falls_back))) };
    }
    let mut status = -1;
    assert_eq!(unsafe { waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
}
