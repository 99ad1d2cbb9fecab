// Package translatetest has a service that speaks gRPC, and the same one speaking
// REST, for tests of translation.
package translatetest

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	_ "google.golang.org/genproto/googleapis/api/annotations" // imported by the descriptors
	"google.golang.org/genproto/googleapis/api/httpbody"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	reflectv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// Set is the FileDescriptorSet of shop.proto.
//
//go:embed shop.binpb
var Set []byte

// Get is one of its methods.
const Get = "/shop.v1.Shop/Get"

// Service is its descriptor.
func Service(t testing.TB) protoreflect.ServiceDescriptor {
	t.Helper()
	f, err := file()
	if err != nil {
		t.Fatal(err)
	}
	return f.Services().ByName("Shop")
}

func file() (protoreflect.FileDescriptor, error) {
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(Set, &set); err != nil {
		return nil, err
	}
	return protodesc.NewFile(set.File[0], protoregistry.GlobalFiles)
}

// Message makes a message of the shop from JSON.
func Message(t testing.TB, name, text string) *dynamicpb.Message {
	t.Helper()
	m := dynamicpb.NewMessage(Service(t).ParentFile().Messages().ByName(protoreflect.Name(name)))
	if err := protojson.Unmarshal([]byte(text), m); err != nil {
		t.Fatal(err)
	}
	return m
}

// GRPC serves the shop with gRPC and reflection at addr, and says where that is. Items are called
// by what happens: "missing" and "locked" are errors, "hang" waits for the caller
// to go, "break" fails after two messages, "odd" has a status that does not exist,
// "huge" is larger than a message may be, and "note" says what metadata came.
func GRPC(t testing.TB, addr string) string {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	sd := Service(t)
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error { return serve(sd, ss) }))
	reflectv1.RegisterServerReflectionServer(s, reflection.NewServerV1(reflection.ServerOptions{Services: named{}, DescriptorResolver: resolver{sd.ParentFile()}}))
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(s.Stop)
	return ln.Addr().String()
}

// named is what reflection lists.
type named struct{}

func (named) GetServiceInfo() map[string]grpc.ServiceInfo {
	return map[string]grpc.ServiceInfo{"shop.v1.Shop": {}, "grpc.reflection.v1.ServerReflection": {}}
}

// resolver knows the shop beside what everybody knows.
type resolver struct{ shop protoreflect.FileDescriptor }

func (r resolver) FindFileByPath(p string) (protoreflect.FileDescriptor, error) {
	if p == r.shop.Path() {
		return r.shop, nil
	}
	return protoregistry.GlobalFiles.FindFileByPath(p)
}

func (r resolver) FindDescriptorByName(n protoreflect.FullName) (protoreflect.Descriptor, error) {
	if n.Parent() == r.shop.Package() {
		if s := r.shop.Services().ByName(n.Name()); s != nil {
			return s, nil
		}
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(n)
}

func serve(sd protoreflect.ServiceDescriptor, ss grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(ss)
	m := sd.Methods().ByName(protoreflect.Name(full[strings.LastIndexByte(full, '/')+1:]))
	if m == nil || !strings.HasPrefix(full, "/shop.v1.Shop/") {
		return status.Error(codes.Unimplemented, "the shop has no "+full)
	}
	in := dynamicpb.NewMessage(m.Input())
	if err := ss.RecvMsg(in); err != nil {
		return err
	}
	_ = ss.SetHeader(metadata.Pairs("shop-header", "h"))
	ss.SetTrailer(metadata.Pairs("shop-trailer", "t"))
	switch m.Name() {
	case "Put":
		return ss.SendMsg(in)
	case "Fill":
		for n := 1; ; n++ {
			if err := ss.RecvMsg(dynamicpb.NewMessage(m.Input())); errors.Is(err, io.EOF) {
				set(in, "price", protoreflect.ValueOfInt64(int64(n)))
				return ss.SendMsg(in)
			} else if err != nil {
				return err
			}
		}
	case "Find":
		out := dynamicpb.NewMessage(m.Output())
		list := out.Mutable(m.Output().Fields().ByName("items")).List()
		item := list.NewElement()
		item.Message().Set(item.Message().Descriptor().Fields().ByName("id"), field(in, "shelf"))
		item.Message().Set(item.Message().Descriptor().Fields().ByName("note"), protoreflect.ValueOfString(JSONOf(in)))
		list.Append(item)
		return ss.SendMsg(out)
	case "Download":
		for _, part := range []string{"one ", "two"} {
			if err := ss.SendMsg(&httpbody.HttpBody{ContentType: "text/plain", Data: []byte(part)}); err != nil {
				return err
			}
		}
		return nil
	}
	return items(ss, m, in)
}

func items(ss grpc.ServerStream, m protoreflect.MethodDescriptor, in *dynamicpb.Message) error {
	id := field(in, "id").String()
	note := ""
	switch id {
	case "missing":
		return status.Error(codes.NotFound, "no such item: 100%")
	case "locked":
		s, err := status.New(codes.FailedPrecondition, "locked").WithDetails(&errdetails.ErrorInfo{Reason: "LOCKED", Domain: "shop"})
		if err != nil {
			return err
		}
		return s.Err()
	case "odd":
		return status.Error(codes.Code(17), "odd")
	case "hang":
		<-ss.Context().Done()
		return status.FromContextError(ss.Context().Err()).Err()
	case "huge":
		note = strings.Repeat("x", 5<<20)
	case "note":
		md, _ := metadata.FromIncomingContext(ss.Context())
		_, timed := ss.Context().Deadline()
		note = fmt.Sprint("user=", md.Get("x-user"), " peer=", md.Get("sallyport-peer"), " judged=", md.Get("sallyport-method"), " timed=", timed)
	}
	n := 1
	if m.IsStreamingServer() {
		n = max(int(field(in, "count").Int()), 0)
	}
	for i := range n {
		out := dynamicpb.NewMessage(m.Output())
		set(out, "id", protoreflect.ValueOfString(id))
		set(out, "price", protoreflect.ValueOfInt64(int64(i)))
		set(out, "note", protoreflect.ValueOfString(note))
		if err := ss.SendMsg(out); err != nil {
			return err
		}
	}
	if id == "break" {
		return status.Error(codes.DataLoss, "broken")
	}
	return nil
}

func field(m *dynamicpb.Message, name protoreflect.Name) protoreflect.Value {
	return m.Get(m.Descriptor().Fields().ByName(name))
}

func set(m *dynamicpb.Message, name protoreflect.Name, v protoreflect.Value) {
	m.Set(m.Descriptor().Fields().ByName(name), v)
}

// JSONOf is a message as text.
func JSONOf(m proto.Message) string {
	b, err := protojson.Marshal(m)
	if err != nil {
		return err.Error()
	}
	return strings.ReplaceAll(string(b), " ", "")
}

// Call calls a method of the shop with gRPC, and returns the messages of the answer
// as text, a line each, and the status.
func Call(ctx context.Context, target, method, in string) (string, error) {
	f, err := file()
	if err != nil {
		return "", err
	}
	m := f.Services().ByName("Shop").Methods().ByName(protoreflect.Name(method))
	if m == nil {
		return "", fmt.Errorf("the shop has no method %s", method)
	}
	req := dynamicpb.NewMessage(m.Input())
	if err := protojson.Unmarshal([]byte(in), req); err != nil {
		return "", err
	}
	cc, err := grpc.NewClient("passthrough:///"+target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return "", err
	}
	defer cc.Close()
	s, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: m.IsStreamingClient()}, "/shop.v1.Shop/"+method)
	if err != nil {
		return "", err
	}
	if err := errors.Join(s.SendMsg(req), s.CloseSend()); err != nil {
		return "", err
	}
	var out strings.Builder
	for {
		item := dynamicpb.NewMessage(m.Output())
		switch err := s.RecvMsg(item); {
		case errors.Is(err, io.EOF):
			return out.String(), nil
		case err != nil:
			return out.String(), err
		}
		out.WriteString(JSONOf(item) + "\n")
	}
}

// REST is the shop in REST. Items are called by what happens: a number is the
// status of the answer, "google" is an error in the form of Google's APIs, "empty"
// has no body, "html" is a page, "more" has a field that nobody knows, "huge" is
// larger than a message may be.
func REST() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/items/{id}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Shop-Header", "h")
		id := r.PathValue("id")
		n := 0
		if _, err := fmt.Sscanf(id, "%3d", &n); err == nil && n >= 200 && n < 600 {
			w.WriteHeader(n)
			_ = json.NewEncoder(w).Encode(map[string]any{"message": "said with " + id})
			return
		}
		switch id {
		case "google":
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"error":{"code":400,"message":"locked","status":"FAILED_PRECONDITION","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"LOCKED","domain":"shop"}]}}`)
		case "empty":
		case "html":
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<p>")
		case "more":
			fmt.Fprint(w, `{"id":"more","colour":"red"}`)
		case "huge":
			fmt.Fprintf(w, `{"note":%q}`, strings.Repeat("x", 5<<20))
		case "hang":
			<-r.Context().Done()
		default:
			_ = json.NewEncoder(w).Encode(map[string]any{"id": id, "note": r.Method + " " + r.RequestURI + " user=" + r.Header.Get("X-User") + " timeout=" + r.Header.Get("X-Server-Timeout")})
		}
	})
	echo := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.Copy(w, r.Body)
	}
	mux.HandleFunc("POST /v1/items", echo)
	mux.HandleFunc("POST /shop.v1.Shop/Plain", echo)
	return mux
}
