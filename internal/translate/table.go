package translate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"connectrpc.com/vanguard"
	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// A table is what is known of the methods of a service.
type table struct {
	set     []byte
	methods map[string]protoreflect.MethodDescriptor
	types   *types
	// calls translates gRPC and gRPC-Web. rest translates REST, and says which
	// method a path means; to it no method is a stream, since what comes of one
	// is written here.
	calls, rest *vanguard.Transcoder
}

// tableOf reads a FileDescriptorSet.
func tableOf(set []byte, o *Offer, log *slog.Logger) (*table, error) {
	if len(set) > maxSet {
		return nil, fmt.Errorf("the descriptors have %d bytes, at most %d", len(set), maxSet)
	}
	var fds descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(set, &fds); err != nil {
		return nil, fmt.Errorf("not a FileDescriptorSet (protoc --include_imports --descriptor_set_out): %w", err)
	}
	complete(&fds)
	files, services, err := read(&fds, o.spec.Services)
	if err != nil {
		return nil, err
	}
	t := &table{set: set, methods: map[string]protoreflect.MethodDescriptor{}, types: newTypes(files)}
	for _, s := range services {
		for i := range s.Methods().Len() {
			m := s.Methods().Get(i)
			t.methods[pathOf(m)] = m
		}
	}
	l := &leg{t, o, log}
	if t.calls, err = transcoder(services, t.types, o.spec.To, l); err != nil {
		return nil, err
	}
	for _, f := range fds.File {
		for _, s := range f.Service {
			for _, m := range s.Method {
				m.ClientStreaming, m.ServerStreaming = nil, nil
			}
		}
	}
	if files, services, err = read(&fds, o.spec.Services); err != nil {
		return nil, err
	}
	// Paths mean methods, whichever way the service speaks.
	t.rest, err = transcoder(services, newTypes(files), toGRPC, l)
	return t, err
}

// read takes the services with these names, all without any.
func read(set *descriptorpb.FileDescriptorSet, names []string) (*protoregistry.Files, []protoreflect.ServiceDescriptor, error) {
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return nil, nil, fmt.Errorf("the descriptors do not hold together (were they written with --include_imports?): %w", err)
	}
	services, err := chosen(files, names)
	return files, services, err
}

// complete adds the imports that every compiler of descriptors knows, and some
// leave out.
func complete(set *descriptorpb.FileDescriptorSet) {
	have := map[string]bool{}
	for _, f := range set.File {
		have[f.GetName()] = true
	}
	for i := 0; i < len(set.File); i++ { // grows
		for _, dep := range set.File[i].Dependency {
			if have[dep] {
				continue
			}
			have[dep] = true
			if known, err := protoregistry.GlobalFiles.FindFileByPath(dep); err == nil {
				set.File = append(set.File, protodesc.ToFileDescriptorProto(known))
			}
		}
	}
}

func chosen(files *protoregistry.Files, names []string) ([]protoreflect.ServiceDescriptor, error) {
	found := map[string]protoreflect.ServiceDescriptor{}
	files.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			found[string(s.FullName())] = s
		}
		return true
	})
	all := slices.Sorted(maps.Keys(found))
	if len(all) == 0 {
		return nil, errors.New("the descriptors have no service")
	}
	if len(names) == 0 {
		names = all
	}
	var out []protoreflect.ServiceDescriptor
	for _, n := range names {
		s, ok := found[n]
		if !ok {
			return nil, fmt.Errorf("services: the descriptors have no service %s, they have %v", n, all)
		}
		out = append(out, s)
	}
	return out, nil
}

func transcoder(services []protoreflect.ServiceDescriptor, known *types, to string, h http.Handler) (*vanguard.Transcoder, error) {
	opts := []vanguard.ServiceOption{
		// Without it a service of gRPC is sent JSON, which few understand.
		vanguard.WithTargetCodecs(vanguard.CodecProto), vanguard.WithNoTargetCompression(),
		vanguard.WithMaxMessageBufferBytes(MaxMessage), vanguard.WithTypeResolver(known),
	}
	strict := to == toGRPC
	if strict {
		opts = append(opts, vanguard.WithTargetProtocols(vanguard.ProtocolGRPC))
	} else {
		opts = append(opts, vanguard.WithTargetProtocols(vanguard.ProtocolREST))
	}
	var all []*vanguard.Service
	for _, s := range services {
		if s.Methods().Len() > 0 {
			all = append(all, vanguard.NewServiceWithSchema(s, h, opts...))
		}
	}
	with := []vanguard.TranscoderOption{
		vanguard.WithRules(rulesOf(services)...), boundedGzip(),
		vanguard.WithCodec(func(r vanguard.TypeResolver) vanguard.Codec { return newJSON(r, strict) }),
	}
	if !strict {
		with = append(with, vanguard.WithCodec(func(r vanguard.TypeResolver) vanguard.Codec { return protoCodec{vanguard.NewProtoCodec(r)} }))
	}
	tr, err := vanguard.NewTranscoder(all, with...)
	if err != nil {
		return nil, fmt.Errorf("the descriptors cannot be translated: %w", err)
	}
	return tr, nil
}

// rulesOf are rules of REST for the methods that have none of their own.
func rulesOf(services []protoreflect.ServiceDescriptor) (rules []*annotations.HttpRule) {
	for _, s := range services {
		for i := range s.Methods().Len() {
			if m := s.Methods().Get(i); !proto.HasExtension(m.Options(), annotations.E_Http) {
				rules = append(rules, &annotations.HttpRule{Selector: string(m.FullName()), Pattern: &annotations.HttpRule_Post{Post: pathOf(m)}, Body: "*"})
			}
		}
	}
	return rules
}

// pathOf is the canonical method.
func pathOf(m protoreflect.MethodDescriptor) string {
	return "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
}

// methodAt is the method that a request of REST means. The table that will
// translate it says so, and is not asked for more.
func (t *table) methodAt(verb, path string) string {
	p := &probe{}
	ctx := context.WithValue(context.Background(), probeKey{}, p)
	r := (&http.Request{Method: verb, URL: &url.URL{Path: path}, Header: http.Header{}, Body: http.NoBody, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}).WithContext(ctx)
	t.rest.ServeHTTP(p, r)
	return p.method
}

// certain says that a service which takes the request as it is cannot take it for
// another method than this one: it may decode what is escaped before it looks,
// such as the ':' before a verb, or take an empty last segment for none.
func (t *table) certain(r Request, method string) bool {
	path, err := url.PathUnescape(r.Path)
	return err == nil && (path == r.Path || t.methodAt(r.Verb, path) == method) && (path == "/" || !strings.HasSuffix(path, "/"))
}

type probeKey struct{}

// A probe hears which method was found and takes no answer.
type probe struct {
	header http.Header
	method string
}

func (p *probe) Header() http.Header {
	if p.header == nil {
		p.header = http.Header{}
	}
	return p.header
}
func (p *probe) Write(b []byte) (int, error) { return len(b), nil }
func (p *probe) WriteHeader(int)             {}
func (p *probe) Flush()                      {}

// types finds messages first in the descriptors of the service, then among those
// that everybody knows, such as details of errors.
type types struct {
	*dynamicpb.Types
}

func newTypes(files *protoregistry.Files) *types { return &types{dynamicpb.NewTypes(files)} }

// FindMessageByName implements vanguard.TypeResolver.
func (t *types) FindMessageByName(n protoreflect.FullName) (protoreflect.MessageType, error) {
	if m, err := t.Types.FindMessageByName(n); err == nil {
		return m, nil
	}
	return protoregistry.GlobalTypes.FindMessageByName(n)
}

// FindMessageByURL implements vanguard.TypeResolver.
func (t *types) FindMessageByURL(u string) (protoreflect.MessageType, error) {
	if m, err := t.Types.FindMessageByURL(u); err == nil {
		return m, nil
	}
	return protoregistry.GlobalTypes.FindMessageByURL(u)
}
