package control

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"sallyport/internal/control/meshpb"
)

// TestOlderProgramsAreUnderstood holds mesh.proto to what older programs speak:
// whatever they say or hear goes on to mean the same. testdata/wire has
// mesh.proto as a descriptor, as it was at the commits that name the files; they
// are never changed, and a release adds its own.
func TestOlderProgramsAreUnderstood(t *testing.T) {
	files, err := filepath.Glob("testdata/wire/*.binpb")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var d descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(b, &d); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		old, err := protodesc.NewFile(&d, protoregistry.GlobalFiles)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, broken := range brokenBy(meshpb.File_mesh_proto, old) {
			t.Errorf("%s: %s", name, broken)
		}
	}
}

// TestOlderProgramsAreUnderstood would notice these.
func TestBrokenWireIsNoticed(t *testing.T) {
	for name, change := range map[string]func(d *descriptorpb.FileDescriptorProto){
		"a field gone": func(d *descriptorpb.FileDescriptorProto) {
			m := d.MessageType[0]
			m.Field[0].Number = proto.Int32(9999)
		},
		"a field of another name": func(d *descriptorpb.FileDescriptorProto) { d.MessageType[0].Field[0].Name = proto.String("other") },
		"a message gone": func(d *descriptorpb.FileDescriptorProto) {
			d.MessageType = append(d.MessageType, &descriptorpb.DescriptorProto{Name: proto.String("Gone")})
		},
		"a method gone": func(d *descriptorpb.FileDescriptorProto) { d.Service[0].Method[0].Name = proto.String("Gone") },
		"a stream that was a call": func(d *descriptorpb.FileDescriptorProto) {
			m := d.Service[0].Method[0]
			m.ClientStreaming = proto.Bool(!m.GetClientStreaming())
		},
	} {
		d := protodesc.ToFileDescriptorProto(meshpb.File_mesh_proto)
		change(d)
		old, err := protodesc.NewFile(d, protoregistry.GlobalFiles)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(brokenBy(meshpb.File_mesh_proto, old)) == 0 {
			t.Errorf("%s is not noticed", name)
		}
	}
}

// brokenBy lists what was in the old file and is not, or is otherwise, in the
// present one.
func brokenBy(now, old protoreflect.FileDescriptor) (bad []string) {
	for i := range old.Messages().Len() {
		m := old.Messages().Get(i)
		have := now.Messages().ByName(m.Name())
		if have == nil {
			bad = append(bad, string(m.FullName())+" is gone")
			continue
		}
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			g := have.Fields().ByNumber(f.Number())
			switch {
			case g == nil:
				bad = append(bad, string(f.FullName())+" is gone")
			case f.Kind() != g.Kind() || f.Cardinality() != g.Cardinality() || f.Name() != g.Name() || f.HasPresence() != g.HasPresence() || kindName(f) != kindName(g):
				bad = append(bad, string(f.FullName())+" is another")
			}
		}
	}
	for i := range old.Enums().Len() {
		e := old.Enums().Get(i)
		for i := range e.Values().Len() {
			v := e.Values().Get(i)
			if have := now.Enums().ByName(e.Name()); have == nil || have.Values().ByNumber(v.Number()) == nil || have.Values().ByNumber(v.Number()).Name() != v.Name() {
				bad = append(bad, string(v.FullName())+" is gone or another")
			}
		}
	}
	for i := range old.Services().Len() {
		s := old.Services().Get(i)
		for i := range s.Methods().Len() {
			m := s.Methods().Get(i)
			var have protoreflect.MethodDescriptor
			if t := now.Services().ByName(s.Name()); t != nil {
				have = t.Methods().ByName(m.Name())
			}
			if have == nil || have.Input().FullName() != m.Input().FullName() || have.Output().FullName() != m.Output().FullName() ||
				have.IsStreamingClient() != m.IsStreamingClient() || have.IsStreamingServer() != m.IsStreamingServer() {
				bad = append(bad, string(m.FullName())+" is gone or another")
			}
		}
	}
	return bad
}

// kindName is the name of the message or enum that a field is of.
func kindName(f protoreflect.FieldDescriptor) protoreflect.FullName {
	switch {
	case f.Message() != nil:
		return f.Message().FullName()
	case f.Enum() != nil:
		return f.Enum().FullName()
	}
	return ""
}
