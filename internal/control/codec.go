package control

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	protobuf "google.golang.org/protobuf/proto"
)

// An encoded message is sent by stream.SendMsg, to as many as there are.
type encoded struct{ bytes []byte }

func encode(m protobuf.Message) (*encoded, error) {
	b, err := protobuf.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode message: %w", err)
	}
	return &encoded{b}, nil
}

// codec is that of gRPC, which it takes encoded messages past.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if e, ok := v.(*encoded); ok {
		return mem.BufferSlice{mem.SliceBuffer(e.bytes)}, nil
	}
	return c.CodecV2.Marshal(v)
}
