package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// stockMethod is the one method of the warehouse, which speaks gRPC.
const stockMethod = "/shop.v1.Stock/Get"

// stock answers it: how many of the item are left. What gRPC is on the wire is
// little enough that the demo does without its library.
func stock(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/grpc")
	in, err := io.ReadAll(io.LimitReader(r.Body, 1<<10))
	if err != nil || len(in) < 5 || in[0] != 0 || int(binary.BigEndian.Uint32(in[1:5])) != len(in)-5 {
		w.Header().Set("Grpc-Status", "3")
		return
	}
	out := append(in[5:len(in):len(in)], protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 3)...)
	w.Header().Set("Trailer", "Grpc-Status")
	_, _ = w.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(out))), out...))
	w.Header().Set("Grpc-Status", "0")
}

// stockDescriptors describe it, and how it is called with REST: the reply is the
// request with one field more.
func stockDescriptors() ([]byte, error) {
	field := func(n int32, name string, kind descriptorpb.FieldDescriptorProto_Type) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{
			Name: &name, JsonName: &name, Number: &n, Type: &kind, Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
		}
	}
	item := field(1, "item", descriptorpb.FieldDescriptorProto_TYPE_STRING)
	rest := &descriptorpb.MethodOptions{}
	proto.SetExtension(rest, annotations.E_Http, &annotations.HttpRule{Pattern: &annotations.HttpRule_Get{Get: "/v1/stock/{item}"}})
	return proto.Marshal(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{{
		Name: proto.String("shop/v1/stock.proto"), Package: proto.String("shop.v1"), Syntax: proto.String("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{
			{Name: proto.String("GetRequest"), Field: []*descriptorpb.FieldDescriptorProto{item}},
			{Name: proto.String("GetReply"), Field: []*descriptorpb.FieldDescriptorProto{item, field(2, "left", descriptorpb.FieldDescriptorProto_TYPE_INT32)}},
		},
		Service: []*descriptorpb.ServiceDescriptorProto{{Name: proto.String("Stock"), Method: []*descriptorpb.MethodDescriptorProto{{
			Name: proto.String("Get"), InputType: proto.String(".shop.v1.GetRequest"), OutputType: proto.String(".shop.v1.GetReply"), Options: rest,
		}}}},
	}}})
}

// askStock has the shop front ask with GET and JSON.
func (a *demoApp) askStock(ctx context.Context) {
	status, _, reply, err := a.do(ctx, http.MethodGet, "http://inventory.mesh.internal/v1/stock/9", nil)
	if ctx.Err() != nil {
		return
	}
	var got struct {
		Item string
		Left int
	}
	e := demoEvent{Probe: "stock", Want: "allow", Status: status}
	e.OK = err == nil && status == http.StatusOK && json.Unmarshal(reply, &got) == nil && got.Item == "9" && got.Left == 3
	if !e.OK {
		e.Detail = fmt.Sprintf("%.200s %v", reply, err)
	}
	a.say(e)
}
