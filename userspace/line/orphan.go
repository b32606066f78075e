// SPDX-License-Identifier: Apache-2.0

package line

import "time"

// Orphan is what the userspace process does when the agent is gone: an
// orphan that kept its listeners would go on serving (a SOCKMAP entry lives
// as long as its socket), under rules that nobody can change any more.
type Orphan struct {
	Listeners   func()        // close the listeners; called at once
	Connections func()        // cut what still lives; called after Grace
	Draining    func() bool   // told to drain: connections then end by themselves
	Idle        func() bool   // nothing lives any more: Grace need not pass; nil: unknown
	Grace       time.Duration // 5 s where it is 0
}

// idleInterval is how often Idle is asked while Grace passes: what restarts
// the agent waits for the end of this process.
const idleInterval = 20 * time.Millisecond

// Watch waits for the end of c and acts it out; it returns when everything
// has been closed, or when the connections may end by themselves.
func (o Orphan) Watch(c *Conn) {
	<-c.Done()
	o.Listeners()
	if o.Draining != nil && o.Draining() {
		return
	}
	if o.Grace == 0 {
		o.Grace = 5 * time.Second
	}
	o.wait()
	o.Connections()
}

func (o Orphan) wait() {
	grace := time.NewTimer(o.Grace)
	defer grace.Stop()
	ask := time.NewTicker(idleInterval)
	defer ask.Stop()
	for o.Idle == nil || !o.Idle() {
		select {
		case <-grace.C:
			return
		case <-ask.C:
		}
	}
}
