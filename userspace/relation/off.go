// SPDX-License-Identifier: Apache-2.0

//go:build norelation

package relation

import (
	"context"
	"errors"

	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Built says whether the relation engine is part of this binary.
const Built = relations.Built

var errNotBuilt = errors.New("this binary was built without the relation engine (build tag norelation)")

// Engine denies every question: the relation engine is not in this binary.
type Engine struct{ why error }

// Open returns an error that says so.
func Open(context.Context, Options) (*Engine, error) { return nil, errNotBuilt }

// Unavailable returns an Engine that denies every question because of err.
func Unavailable(err error) *Engine { return &Engine{errors.Join(errUnavailable, err)} }

// Close does nothing.
func (e *Engine) Close() error { return nil }

// Status returns why nothing is answered.
func (e *Engine) Status() Status { return Status{Problem: e.why.Error()} }

// SetModels takes an empty list only.
func (e *Engine) SetModels(_ context.Context, list []Model) error {
	if len(list) == 0 {
		return nil
	}
	return errNotBuilt
}

// ModelText returns an error.
func (e *Engine) ModelText(context.Context, string) (string, error) { return "", errNotBuilt }

// Cached has no answer.
func (e *Engine) Cached(string, string, string, string) (Answer, bool) { return Answer{}, false }

// Check denies.
func (e *Engine) Check(context.Context, string, string, string, string, ...Tuple) (Answer, flow.Reason, error) {
	return Answer{}, flow.ReasonRelationUnavailable, e.why
}

// Write returns an error.
func (e *Engine) Write(context.Context, string, []Tuple) error { return errNotBuilt }

// Delete returns an error.
func (e *Engine) Delete(context.Context, string, []Tuple) error { return errNotBuilt }

// Read returns an error.
func (e *Engine) Read(context.Context, string, Tuple, int) ([]Tuple, error) { return nil, errNotBuilt }

// ListObjects returns an error.
func (e *Engine) ListObjects(context.Context, string, string, string, string) ([]string, error) {
	return nil, errNotBuilt
}

// Reconcile returns an error.
func (e *Engine) Reconcile(context.Context, string, []Tuple) (Reconciled, error) {
	return Reconciled{}, errNotBuilt
}

// bound is nothing: no model has anything to answer its questions.
type bound struct{}
