// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"encoding/binary"
	"time"
)

// Preface is what a client sends first (RFC 9113, 3.4).
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Frame types (RFC 9113, 6).
const (
	frameData = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePush
	framePing
	frameGoAway
	frameWindow
	frameContinuation
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// lateStreams is for how long a stream is still served that the peer opened
// before it saw GOAWAY.
const lateStreams = time.Second

// Settings (RFC 9113, 6.5.2).
const (
	settingTableSize     = 0x1
	settingPush          = 0x2
	settingMaxStreams    = 0x3
	settingInitialWindow = 0x4
	settingMaxFrame      = 0x5
	settingMaxHeaderList = 0x6
)

const (
	headerSize = 9
	maxFrame   = 16 << 10 // payload that we take, the protocol's default
	// maxData keeps a full DATA frame within one TLS record.
	maxData   = 16<<10 - headerSize
	maxWindow = 1<<31 - 1

	maxContinuations = 8
	maxHeads         = 32 // header lists of a stream that wait to be read
	// maxQueued is how much may wait for the socket beyond Config.WriteLimit,
	// in frames that no window bounds, before nothing more is read.
	maxQueued = 256 << 10
)

type header struct {
	length int
	kind   uint8
	flags  uint8
	stream uint32
}

// parseHeader reads the nine bytes at the start of b.
func parseHeader(b []byte) header {
	return header{int(b[0])<<16 | int(b[1])<<8 | int(b[2]), b[3], b[4], binary.BigEndian.Uint32(b[5:]) & maxWindow}
}

func appendHeader(b []byte, length int, kind, flags uint8, stream uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), kind, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendReset(b []byte, stream uint32, code Code) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(b, 4, frameReset, 0, stream), uint32(code))
}

func appendWindow(b []byte, stream uint32, n int) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(b, 4, frameWindow, 0, stream), uint32(n))
}

func appendGoAway(b []byte, last uint32, code Code) []byte {
	b = binary.BigEndian.AppendUint32(appendHeader(b, 8, frameGoAway, 0, 0), last)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendSettings(b []byte, pairs ...uint32) []byte {
	b = appendHeader(b, len(pairs)/2*6, frameSettings, 0, 0)
	for i := 0; i < len(pairs); i += 2 {
		b = binary.BigEndian.AppendUint16(b, uint16(pairs[i]))
		b = binary.BigEndian.AppendUint32(b, pairs[i+1])
	}
	return b
}

// unpad strips padding and, of HEADERS, the priority fields.
func unpad(h header, p []byte) ([]byte, error) {
	pad := 0
	if h.flags&flagPadded != 0 {
		if len(p) < 1 {
			return nil, fault(CodeFrameSize, "a padded frame without pad length")
		}
		pad = int(p[0])
		p = p[1:]
	}
	if h.kind == frameHeaders && h.flags&flagPriority != 0 {
		if len(p) < 5 {
			return nil, fault(CodeFrameSize, "HEADERS shorter than their priority")
		}
		p = p[5:]
	}
	if pad > len(p) {
		return nil, fault(CodeProtocol, "more padding than frame")
	}
	return p[:len(p)-pad], nil
}
