// The view Experts.

export function show() {}
export function reset() {}
