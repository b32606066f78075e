// SPDX-License-Identifier: Apache-2.0

package netloop

// Current is the task of t's loop that is running. A stream of another package needs it, since Read and Flushed are called by
// whichever task uses the stream; t may be any task of that loop, also one that has returned. It panics where no task runs.
func (t *Task) Current() *Task { return t.l.current() }
