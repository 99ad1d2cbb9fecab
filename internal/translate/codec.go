package translate

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"connectrpc.com/vanguard"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// A jsonCodec is vanguard's, which says what is wrong. Where callers write JSON it
// is strict: a field that nobody knows is a mistake of theirs. A service that
// answers with more than the descriptors know has only grown.
type jsonCodec struct {
	*vanguard.JSONCodec
	strict bool
}

func newJSON(r vanguard.TypeResolver, strict bool) vanguard.Codec {
	j := vanguard.NewJSONCodec(r)
	j.UnmarshalOptions.DiscardUnknown = !strict
	return &jsonCodec{j, strict}
}

// wrong is an error of the one who has written what was read.
func (j *jsonCodec) wrong(err error) error {
	switch {
	case err == nil:
		return nil
	case j.strict:
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	return connect.NewError(connect.CodeInternal, fmt.Errorf("the answer of the service: %w", err))
}

// Unmarshal implements vanguard.Codec.
func (j *jsonCodec) Unmarshal(b []byte, m proto.Message) error {
	return j.wrong(j.JSONCodec.Unmarshal(b, m))
}

// UnmarshalField implements vanguard.RESTCodec. Vanguard puts the value of a field
// between braces: what is no value could name other fields there.
func (j *jsonCodec) UnmarshalField(b []byte, m proto.Message, f protoreflect.FieldDescriptor) error {
	if !json.Valid(b) {
		return j.wrong(errors.New("not JSON"))
	}
	return j.wrong(j.JSONCodec.UnmarshalField(b, m, f))
}

// MarshalAppend implements vanguard.Codec. An error keeps its code when a detail
// is of a type that nobody here knows.
func (j *jsonCodec) MarshalAppend(b []byte, m proto.Message) ([]byte, error) {
	out, err := j.JSONCodec.MarshalAppend(b, m)
	if s, ok := m.(*status.Status); ok && err != nil {
		out, err = j.JSONCodec.MarshalAppend(b, &status.Status{Code: s.Code, Message: s.Message, Details: j.tellable(s.Details)})
	}
	return out, err
}

func (j *jsonCodec) tellable(details []*anypb.Any) (out []*anypb.Any) {
	for _, d := range details {
		if _, err := j.MarshalOptions.Marshal(d); err == nil {
			out = append(out, d)
		}
	}
	return out
}

// A protoCodec is vanguard's, for a service of REST, whose callers write protobuf.
type protoCodec struct{ *vanguard.ProtoCodec }

// Unmarshal implements vanguard.Codec.
func (p protoCodec) Unmarshal(b []byte, m proto.Message) error {
	if err := p.ProtoCodec.Unmarshal(b, m); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	return nil
}

// packing is the one that requests may have. They are unpacked before vanguard
// sees them, which would not count what it holds.
const packing = vanguard.CompressionGzip

// An unpacked body is what a packed one holds, all of which counts.
type unpacked struct {
	*held
	from  io.Reader
	z     bounded
	begun bool
}

// Read implements io.Reader.
func (u *unpacked) Read(p []byte) (int, error) {
	if !u.begun {
		if err := u.z.Reset(u.from); err != nil {
			return 0, err
		}
		u.begun = true
	}
	n, err := u.z.Read(p)
	if !u.take(n) {
		return 0, errHeld
	}
	return n, err
}

// boundedGzip is gzip that does not unpack more than a message may have.
func boundedGzip() vanguard.TranscoderOption {
	return vanguard.WithCompression(vanguard.CompressionGzip,
		func() connect.Compressor { return gzip.NewWriter(io.Discard) },
		func() connect.Decompressor { return &bounded{} })
}

type bounded struct {
	gzip.Reader
	left int
}

// Reset implements connect.Decompressor.
func (z *bounded) Reset(r io.Reader) error {
	z.left = MaxMessage + 1
	return z.Reader.Reset(r)
}

// Read implements io.Reader.
func (z *bounded) Read(p []byte) (int, error) {
	if z.left <= 0 {
		return 0, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("a message unpacks to more than %d bytes", MaxMessage))
	}
	n, err := z.Reader.Read(p[:min(len(p), z.left)])
	z.left -= n
	return n, err
}
