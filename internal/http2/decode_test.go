package http2

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// fieldsOf tells what a section holds, and what is in the table behind it.
func fieldsOf(s *section) (fields, table []string) {
	for i := range s.special {
		if s.pseudo&(1<<i) != 0 {
			name := [...]string{":method", ":scheme", ":authority", ":path", ":protocol", ":status"}[i]
			fields = append(fields, name+": "+string(s.special[i]))
		}
	}
	for line := range bytes.Lines(s.lines) {
		fields = append(fields, strings.TrimSuffix(string(line), "\r\n"))
	}
	for i := range s.table.n {
		f, _ := s.table.at(len(static) + i)
		table = append(table, strings.TrimSuffix(string(f.line), "\r\n"))
	}
	return fields, table
}

// The examples of RFC 7541 appendix C, those of a connection in turn.
func TestExamplesOfRFC7541(t *testing.T) {
	type step struct {
		block         string
		fields, table []string
		size          int
	}
	requests := func(blocks ...string) []step {
		first := []string{":method: GET", ":scheme: http", ":authority: www.example.com", ":path: /"}
		return []step{
			{blocks[0], first, []string{":authority: www.example.com"}, 57},
			{blocks[1], append(slices.Clone(first), "cache-control: no-cache"), []string{"cache-control: no-cache", ":authority: www.example.com"}, 110},
			{
				blocks[2], []string{":method: GET", ":scheme: https", ":authority: www.example.com", ":path: /index.html", "custom-key: custom-value"},
				[]string{"custom-key: custom-value", "cache-control: no-cache", ":authority: www.example.com"}, 164,
			},
		}
	}
	const (
		date     = "date: Mon, 21 Oct 2013 20:13:21 GMT"
		later    = "date: Mon, 21 Oct 2013 20:13:22 GMT"
		location = "location: https://www.example.com"
		cookie   = "set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
	)
	responses := func(blocks ...string) []step {
		rest := []string{"cache-control: private", date, location}
		return []step{
			{blocks[0], append([]string{":status: 302"}, rest...), []string{location, date, "cache-control: private", ":status: 302"}, 222},
			{blocks[1], append([]string{":status: 307"}, rest...), []string{":status: 307", location, date, "cache-control: private"}, 222},
			{
				blocks[2], []string{":status: 200", "cache-control: private", later, location, "content-encoding: gzip", cookie},
				[]string{cookie, "content-encoding: gzip", later}, 215,
			},
		}
	}
	for _, tt := range []struct {
		name  string
		most  int
		steps []step
	}{
		{"C.2.1 literal with indexing", 4096, []step{{"400a637573746f6d2d6b65790d637573746f6d2d686561646572", []string{"custom-key: custom-header"}, []string{"custom-key: custom-header"}, 55}}},
		{"C.2.2 literal without indexing", 4096, []step{{"040c2f73616d706c652f70617468", []string{":path: /sample/path"}, nil, 0}}},
		{"C.2.3 literal never indexed", 4096, []step{{"100870617373776f726406736563726574", []string{"password: secret"}, nil, 0}}},
		{"C.2.4 indexed", 4096, []step{{"82", []string{":method: GET"}, nil, 0}}},
		{"C.3 requests", 4096, requests("828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865", "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565")},
		{"C.4 requests with Huffman coding", 4096, requests("828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf", "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")},
		{"C.5 responses", 256, responses(
			"4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e1768747470733a2f2f7777772e6578616d706c652e636f6d",
			"4803333037c1c0bf",
			"88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31")},
		{"C.6 responses with Huffman coding", 256, responses(
			"488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
			"4883640effc1c0bf",
			"88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s section
			s.init(4096)
			s.table.most = tt.most
			for i, step := range tt.steps {
				b, err := hex.DecodeString(step.block)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.decode(b); err != nil || s.large {
					t.Fatal(i, err)
				}
				fields, table := fieldsOf(&s)
				if !slices.Equal(fields, step.fields) {
					t.Errorf("%d: the fields are %q, want %q", i, fields, step.fields)
				}
				if !slices.Equal(table, step.table) || s.table.size != step.size {
					t.Errorf("%d: the table of size %d is %q, want %d, %q", i, s.table.size, table, step.size, step.table)
				}
			}
		})
	}
}

// What RFC 7541 forbids ends the connection.
func TestBlocksThatDoNotDecode(t *testing.T) {
	for name, block := range map[string]string{
		"index 0":                           "80",
		"index behind the table":            "be",
		"name behind the table":             "7e0161",
		"index that does not end":           "ff",
		"index beyond all bounds":           "ffffffffff7f",
		"index of many empty bytes":         "ff8080808000",
		"no name":                           "40",
		"no value":                          "400161",
		"name that is cut off":              "40056161",
		"value that is cut off":             "4001610561",
		"length beyond all bounds":          "40017f7fffffffff7f61",
		"table larger than we said":         "3fe21f",
		"size of the table behind a field":  "8220",
		"size of the table does not end":    "3f",
		"Huffman: padding of eight bits":    "40016182" + "1fff", // "a", ones
		"Huffman: padding of zeros":         "4001618118",
		"Huffman: EOS":                      "40016184ffffffff",
		"Huffman: EOS behind a symbol":      "400161851fffffffff",
		"Huffman: code that is cut off":     "40016181fe",
		"Huffman: nothing but padding":      "40016182ffff",
		"Huffman: long code that is cut of": "40016183fffffe",
	} {
		t.Run(name, func(t *testing.T) {
			b, err := hex.DecodeString(block)
			if err != nil {
				t.Fatal(err)
			}
			var s section
			s.init(4096)
			if err := s.decode(b); err == nil {
				t.Errorf("it decodes to %q", s.lines)
			}
		})
	}
}

// Every byte, in every company, is decoded as golang.org/x/net encodes it.
func TestHuffman(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 541))
	for n := range 2000 {
		p := make([]byte, n%40)
		for i := range p {
			if p[i] = byte(rnd.Uint32()); n%2 == 0 {
				p[i] = "0123456789 abcdefghijklmnopqrstuvwxyz/-."[p[i]%40]
			}
		}
		got, ok := appendHuffman([]byte("before"), hpack.AppendHuffmanString(nil, string(p)))
		if !ok || string(got) != "before"+string(p) {
			t.Fatalf("%q became %q, %v", p, got, ok)
		}
	}
}

// A block is small whose fields are large: of what is too much nothing is kept,
// and the table goes on all the same.
func TestBombOfIndexes(t *testing.T) {
	var s section
	s.init(8 << 10)
	block := append(hpackLiteral("a", strings.Repeat("x", 4040)), bytes.Repeat([]byte{0xbe}, 16<<10)...)
	if err := s.decode(append(block, hpackLiteral("b", "y")...)); err != nil {
		t.Fatal(err)
	}
	if !s.large || cap(s.lines) > 32<<10 {
		t.Errorf("large: %v; %d bytes are held", s.large, cap(s.lines))
	}
	if s.rest(); cap(s.lines) > keepFragment {
		t.Errorf("at rest %d bytes are held", cap(s.lines))
	}
	if _, table := fieldsOf(&s); !slices.Equal(table, []string{"b: y"}) {
		t.Errorf("the table holds %.80q", table)
	}
}

func hpackLiteral(name, value string) []byte {
	b := append([]byte{0x40}, appendInt(nil, 0, 7, uint64(len(name)))...)
	b = appendInt(append(b, name...), 0, 7, uint64(len(value)))
	return append(b, value...)
}

// A section whose fields have been seen before costs no allocation, nor does one
// that always brings new ones.
func TestDecodeAllocatesNothing(t *testing.T) {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	var s section
	s.init(32 << 10)
	n := 0
	decode := func() {
		buf.Reset()
		n++
		for _, f := range []hpack.HeaderField{
			{Name: ":method", Value: "GET"}, {Name: ":path", Value: "/v1/charges"}, {Name: "user-agent", Value: "test/1"},
			{Name: "x-request-id", Value: fmt.Sprint(n)}, {Name: "authorization", Value: "secret", Sensitive: true},
		} {
			_ = enc.WriteField(f)
		}
	}
	for range 1000 {
		decode()
		if err := s.decode(buf.Bytes()); err != nil {
			t.Fatal(err)
		}
	}
	var blocks [][]byte
	for range 101 {
		decode()
		blocks = append(blocks, bytes.Clone(buf.Bytes()))
	}
	if n := testing.AllocsPerRun(100, func() {
		_ = s.decode(blocks[0])
		blocks = blocks[1:]
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzDecode: our decoder and that of golang.org/x/net read the same in a block,
// and the same in the next one, for which their tables must be the same; or both
// refuse. Ours is stricter where theirs takes integers of any length, and sizes of
// the table behind a field; theirs where the size is changed twice while the table
// has fields, as a block may begin (RFC 7541 section 4.2).
func FuzzDecode(f *testing.F) {
	for _, b := range []string{
		"828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf", "4803333032580770726976617465", "3fe11f828684", "20823f",
		"100870617373776f726406736563726574", "400161850e7f8f", "ff8000", "400161842020", "40024142016182",
	} {
		p, _ := hex.DecodeString(b)
		f.Add(p, p)
	}
	f.Add([]byte("\x40\x01a\x01b"), []byte("\x20\x3f\x3d\xbe"))
	f.Add([]byte("\x40\x01a\x01b"), []byte("\x3f\x3d\x3f\x3d\xbe"))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var s section
		s.init(4096)
		dec := hpack.NewDecoder(tableSize, nil)
		for _, block := range [][]byte{one, two} {
			theirs, err := dec.DecodeFull(block)
			ours := s.decode(block)
			if ours != nil {
				if err == nil && !lax(block) {
					t.Fatalf("%x: they read %v, we do not", block, theirs)
				}
				return
			}
			if err != nil && resized(resized(block)) != nil {
				return
			}
			if err != nil {
				t.Fatalf("%x: we read it, they do not: %v", block, err)
			}
			var size int
			var lines, crumbs []string
			for _, f := range theirs {
				if size += int(f.Size()); size > s.most {
					break
				}
				switch classOf([]byte(f.Name)) {
				case classPlain, classTE, classType, classTrailer:
					if validValue([]byte(f.Value)) {
						lines = append(lines, f.Name+": "+f.Value+"\r\n")
					}
				case classCookie:
					if validValue([]byte(f.Value)) {
						crumbs = append(crumbs, f.Value)
					}
				}
			}
			if size > s.most != s.large {
				t.Fatalf("%x: of size %d; large: %v", block, size, s.large)
			}
			if got, want := string(s.lines), strings.Join(lines, ""); got != want {
				t.Fatalf("%x: we read %q, they %q", block, got, want)
			}
			if got, want := strings.Trim(string(s.cookies), "; "), strings.Trim(strings.Join(crumbs, "; "), "; "); got != want {
				t.Fatalf("%x: we read the cookies %q, they %q", block, got, want)
			}
			if s.table.size > s.table.most || s.table.n > tableSize/32 || cap(s.table.arena) > 4*tableSize {
				t.Fatalf("%x: the table has %d fields of size %d, and holds %d bytes", block, s.table.n, s.table.size, cap(s.table.arena))
			}
		}
	})
}

// resized gives what follows the change of the table's size that a block begins
// with; nil when it begins with none.
func resized(block []byte) []byte {
	if len(block) == 0 || block[0]&0xe0 != 0x20 {
		return nil
	}
	_, rest, _ := readInt(block, 5)
	return rest
}

// lax says whether a block may hold what only we refuse.
func lax(block []byte) bool {
	if bytes.Count(block, []byte{0x80})+bytes.Count(block, []byte{0xff}) > 0 {
		return true // an integer with empty bytes in it
	}
	for _, c := range block[min(1, len(block)):] {
		if c&0xe0 == 0x20 {
			return true // a size of the table behind a field
		}
	}
	return false
}
