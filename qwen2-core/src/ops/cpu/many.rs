//! Any number of values of one type as one argument of an operation.

use burn::backend::{
    Backend, BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType,
};

/// All with tensors of one backend.
pub(crate) struct Many<E>(pub(crate) Vec<E>);

impl<B: Backend, E: ExtensionType<B>> ExtensionType<B> for Many<E> {
    type Target = Many<E::Target>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let map = |one: E| one.map_to_dispatch(&map_kind, autodiff);
        Many(self.0.into_iter().map(map).collect())
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        let map = |one| E::map_from_dispatch(one, &unwrap_kind);
        Self(target.0.into_iter().map(map).collect())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.iter().find_map(E::routing_tensor)
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.iter().find_map(E::routing_float_tensor)
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let start = DispatchAutodiffContext::Disabled;
        target.0.iter().fold(start, |context, one| {
            context.merge(E::autodiff_context(one))
        })
    }
}
