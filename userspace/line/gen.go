// SPDX-License-Identifier: Apache-2.0

package line

//go:generate protoc --go_out=. --go_opt=paths=source_relative linepb/line.proto
