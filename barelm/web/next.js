// The view Next token.

export function show() {}
export function reset() {}
