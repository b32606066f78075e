// SPDX-License-Identifier: Apache-2.0

package schema

//go:generate go run ./internal/generate -o comments.go
//go:generate go run ./internal/generate -schema -o sallyport.schema.json
