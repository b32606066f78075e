// SPDX-License-Identifier: Apache-2.0

// Package netloop runs connections on one epoll loop a core. It is the only package that knows descriptors, epoll and
// coroutines; what stands above it is sequential code that sees a [Task] and a [Conn].
//
// # Tasks
//
// A Task is one piece of sequential code that belongs to one loop for its whole life. Tasks of a loop never run at the
// same time: a task runs until it parks, and it parks only in Conn.Read, Conn.AwaitRead, Conn.Flushed, Task.Sleep,
// Task.Wait, Task.WaitTimeout, Task.Block, Task.Adopt, Task.AdoptBy, Task.Yield and Relay. Between two of these calls
// everything the tasks of that loop share may be used without a lock. A task that computes for long or blocks in the
// kernel holds up its whole loop: what really waits goes into Task.Block.
//
// A task must never park while it holds a mutex that another task of the loop may want, since the second would then stop
// the thread that has to resume the first.
//
// # Connections
//
// A Conn is a net.Conn and may be used only by tasks of its loop; Engine.Kill and Engine.Post are the ways in from other
// goroutines. One task may read it while others write it. Two tasks must not read it at the same time: the second Read
// fails with ErrBusy, and under a tls.Conn, whose Read holds a mutex, it would stop the loop.
//
// Write never parks, because crypto/tls calls it with a mutex held. It copies into the output buffer of the connection,
// which is sent at the end of the loop's turn, so that what several writes of one turn produced leaves in one system call.
// Whoever writes in a loop calls Flushed(max) after each write: it parks until at most max bytes wait, and that is where
// back-pressure happens. For a tls.Conn or a stream of another package the function Flushed finds the connection
// beneath. A writer that never waits meets a hard bound of four times Options.WriteLimit: the write fails with
// ErrWriteLimit and the connection is aborted. A peer that takes nothing for Options.StallTimeout while output waits is
// cut off, also after Close, which lets what was already written leave first.
//
// A write deadline is the bound of Write and Flushed calls, not of bytes already accepted: crypto/tls puts the deadline into
// the past after its close_notify, which still has to be sent.
//
// tls.Server(conn, config) and tls.Client(conn, config) work as they are, with Handshake and not HandshakeContext, since
// that one closes the connection from a goroutine of its own when its context can end; bound it by SetDeadline. Finish the
// handshake before a second task uses the tls.Conn: until then every call on it wants the mutex that the handshake parks with.
//
// A task that an Event wakes runs after those already due in the turn. So one task that writes what the others have put together,
// signalled by each, writes once for all of them.
//
// # The two engines
//
// With Options.Goroutines the same interface is served by package net and one goroutine a task. A lock for each loop, given up
// while a task is parked, keeps the promise that tasks of a loop take turns, so what runs on one engine is correct on
// the other and the race detector sees all of it. One conformance suite holds both.
package netloop
