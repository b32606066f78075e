// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import "errors"

// bound is what a model's questions go to.
type bound struct {
	backend backend
	remote  *remote // nil for one in this process
}

// abandon ends what follows an engine elsewhere.
func (m *model) abandon() {
	if m.remote != nil {
		m.remote.stop()
	}
}

// known says whether questions can be asked: an engine elsewhere has told
// where.
func (m *model) known() bool {
	return m.ids.Load() != nil && (m.remote == nil || !m.remote.lost.Load())
}

// unanswered is why the engine elsewhere of a model has told nothing yet.
func (m *model) unanswered() error {
	if why := m.remote.problem.Load(); why != nil {
		return errors.New(*why)
	}
	return errNotYet
}
