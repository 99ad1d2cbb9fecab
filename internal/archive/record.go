package archive

import (
	"encoding/base64"
	"encoding/json"
	"time"
	"unicode/utf8"
)

// A Record joins what is known of one call that was copied.
type Record struct {
	Time  time.Time `json:"time"`
	Trace string    `json:"trace"`
	Route string    `json:"route,omitempty"`
	// Name is that of the shadow. Src and Dst are the SPIFFE IDs of caller and
	// primary, ShadowDst is the service that got the copy.
	Name      string `json:"name"`
	Src       string `json:"src"`
	Dst       string `json:"dst"`
	ShadowDst string `json:"shadow_dst"`

	Request *Request `json:"request,omitempty"`
	Primary *Answer  `json:"primary,omitempty"`
	Shadow  *Answer  `json:"shadow,omitempty"`
	// Replayed is what a replay was answered.
	Replayed *Answer `json:"replayed,omitempty"`
	// Failed says why there is no answer of the shadow.
	Failed string `json:"failed,omitempty"`
	// Differs are the fields in which the answers differ.
	Differs []string `json:"differs,omitempty"`
	// How long the caller waited, and how long the shadow took, in
	// microseconds.
	PrimaryMicros int64 `json:"primary_us"`
	ShadowMicros  int64 `json:"shadow_us"`
}

// A Request is that of a call.
type Request struct {
	Method string `json:"method"`
	Host   string `json:"host"`
	Path   string `json:"path"`
	Query  string `json:"query,omitempty"`
	Message
}

// An Answer is a final response.
type Answer struct {
	Status int `json:"status"`
	Message
}

// A Message is what requests and answers have in common.
type Message struct {
	Headers  []Field `json:"headers"`
	Body     Body    `json:"-"`
	Trailers []Field `json:"trailers,omitempty"`
	// Omitted says why there is no body; SHA256 is the hash of one that was too
	// large.
	Omitted string `json:"omitted,omitempty"`
	SHA256  string `json:"body_sha256,omitempty"`
}

// A Field is name and value.
type Field [2]string

// A Body is bytes: in JSON text, or base64 where they are no text.
type Body []byte

type bodyForm struct {
	Text   string `json:"body,omitempty"`
	Base64 string `json:"body_base64,omitempty"`
}

func (b Body) form() bodyForm {
	if utf8.Valid(b) {
		return bodyForm{Text: string(b)}
	}
	return bodyForm{Base64: base64.StdEncoding.EncodeToString(b)}
}

func (f bodyForm) body() (Body, error) {
	if f.Base64 != "" {
		return base64.StdEncoding.DecodeString(f.Base64)
	}
	if f.Text == "" {
		return nil, nil
	}
	return Body(f.Text), nil
}

// plainRequest and plainAnswer are the forms without methods.
type (
	plainRequest Request
	plainAnswer  Answer
)

// MarshalJSON implements json.Marshaler.
func (r *Request) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		*plainRequest
		bodyForm
	}{(*plainRequest)(r), r.Body.form()})
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *Request) UnmarshalJSON(b []byte) (err error) {
	in := struct {
		*plainRequest
		bodyForm
	}{plainRequest: (*plainRequest)(r)}
	if err = json.Unmarshal(b, &in); err == nil {
		r.Body, err = in.body()
	}
	return err
}

// MarshalJSON implements json.Marshaler.
func (a *Answer) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		*plainAnswer
		bodyForm
	}{(*plainAnswer)(a), a.Body.form()})
}

// UnmarshalJSON implements json.Unmarshaler.
func (a *Answer) UnmarshalJSON(b []byte) (err error) {
	in := struct {
		*plainAnswer
		bodyForm
	}{plainAnswer: (*plainAnswer)(a)}
	if err = json.Unmarshal(b, &in); err == nil {
		a.Body, err = in.body()
	}
	return err
}

// Get is the value of the first field of a name in lower case; empty without.
func (m *Message) Get(name string) string {
	for _, f := range m.Headers {
		if fold(f[0]) == name {
			return f[1]
		}
	}
	return ""
}
