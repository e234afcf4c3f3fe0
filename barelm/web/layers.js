// The view Layers.

export function show() {}
export function reset() {}
