// Package meshpb is the generated form of mesh.proto: the messages and service
// stubs of sallyport.mesh.v1.
//
// It holds no behaviour of ours. internal/control turns its messages into the
// nouns of internal/mesh and back.
package meshpb

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative mesh.proto
