// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"encoding/base64"
	"strconv"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
	"google.golang.org/protobuf/encoding/protowire"
)

// errorDomain is the domain of our reasons in google.rpc.ErrorInfo.
const errorDomain = "sallyport.dev"

// appendStatus appends the answer to a refused call of gRPC: trailers alone,
// with the status and its details (gRPC over HTTP/2, "Responses").
func appendStatus(list []http2.Field, d *flow.Decision, proven bool, id string) []http2.Field {
	reason := d.Reason
	list = append(list, http2.Field{Name: ":status", Value: "200"}, http2.Field{Name: "content-type", Value: "application/grpc"},
		http2.Field{Name: "grpc-status", Value: strconv.Itoa(reason.GRPC())},
		http2.Field{Name: "grpc-message", Value: percentEncode(reason.Public())},
		http2.Field{Name: "grpc-status-details-bin", Value: base64.RawStdEncoding.EncodeToString(statusDetails(reason, proven, id)), Sensitive: true})
	return appendTold(list, d, id)
}

// statusDetails is a google.rpc.Status with a google.rpc.ErrorInfo, whose
// reason is "" where the caller is not told.
func statusDetails(reason flow.Reason, proven bool, id string) []byte {
	var entry, info, detail, status []byte
	entry = appendString(entry, 1, "requestID") // a map is a list of key and value
	entry = appendString(entry, 2, id)
	info = appendString(info, 1, string(reason.Told(proven)))
	info = appendString(info, 2, errorDomain)
	info = appendString(info, 3, string(entry))
	detail = appendString(detail, 1, "type.googleapis.com/google.rpc.ErrorInfo") // google.protobuf.Any
	detail = appendString(detail, 2, string(info))
	status = protowire.AppendVarint(protowire.AppendTag(status, 1, protowire.VarintType), uint64(reason.GRPC()))
	status = appendString(status, 2, reason.Public())
	return appendString(status, 3, string(detail))
}

// appendString appends a field of text, bytes or a message, which proto3
// leaves out where it is empty.
func appendString(b []byte, field protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), v)
}

// percentEncode is the encoding of grpc-message.
func percentEncode(s string) string {
	const hex = "0123456789ABCDEF"
	out := make([]byte, 0, len(s))
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '%' {
			out = append(out, '%', hex[c>>4], hex[c&15])
			continue
		}
		out = append(out, c)
	}
	return string(out)
}
